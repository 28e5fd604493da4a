"""Trains two small models at 256 tokens, then reads 512, 1,024 and 2,048 with each way of extending RoPE.

    python -m benchmarks.long_context --work long_context

One model learns code of the Python standard library; its perplexity is measured by position on files that it has not read.
The other learns to follow instructions: among random words it is told facts (the value of a key), and later asked for the
value of a key. Its right answers are counted. Neither model is trained at the longer lengths, and all ways read the same
weights.

The weights and results are kept in the folder, so that an interrupted run goes on. The script prints two tables and draws a
plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from flagscale_like.arch import ModelArch, Position
from flagscale_like.config import Optimizer, Parallel
from flagscale_like.data.batch import Batch
from flagscale_like.data.tokenizer import Tokenizer, train_bpe
from flagscale_like.engine.engine import Engine
from flagscale_like.model.build import LanguageModel
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import ParallelContext, parallel_context

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAINED = 256
LENGTHS = (256, 512, 1024, 2048)
WAYS = ("none", "linear", "dynamic NTK", "YaRN", "NLPE clipped", "NLPE compressed")
NEAR, FAR_FACTOR = (
    128,
    16.0,
)  # NLPE: up to 128 tokens are near; 2,048 tokens have distances below 128 + 1,920 / 16 = 248
VOCABULARY = 2048
HELD_OUT = ("multiprocessing", "tkinter", "xml", "sqlite3", "wsgiref", "curses")
BATCH, RATE = 8, {"code": 2e-3, "recall": 3e-3}  # rows a step, learning rates
INIT_STD = 0.08  # about 1 / sqrt(width)
BIN = 64  # positions whose losses are averaged

# The retrieval task. A fact is one word, which means "KEY is VALUE"; words that mean nothing lie between.
KEYS, VALUES, WORDS = 16, 16, 80
FACT, ASK, VALUE, WORD = (
    0,
    KEYS * VALUES,
    KEYS * VALUES + KEYS,
    KEYS * VALUES + KEYS + VALUES,
)  # the first of each kind
FACTS, QUESTIONS = 8, 60


def position(way: str, length: int) -> Position:
    """How a text of `length` tokens is read. linear and YaRN are made for the length, dynamic NTK and NLPE for any."""
    scaled = {"factor": length / TRAINED}
    original = {"original_max_position_embeddings": TRAINED}
    scaling = {
        "linear": {"kind": "linear", **scaled},
        "dynamic NTK": {"kind": "dynamic", "factor": 2.0, **original},
        "YaRN": {"kind": "yarn", **scaled, **original},
    }
    if way in scaling:
        return Position.model_validate({"scaling": scaling[way]})
    if way == "none":
        return Position()
    far = way.removeprefix("NLPE ")
    return Position.model_validate({"kind": "nlpe", "threshold": NEAR, "far": far, "far_factor": FAR_FACTOR})


# ------------------------------------------------------------------------------------------------------------ the data


def code_tokens(work: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens to learn from, files one after another, and the held-out windows of the longest length plus 1."""
    files = {"train": [], "held_out": []}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"} & set(parts):
            files["held_out" if parts[0] in HELD_OUT else "train"].append(path)
    tokenizer = work / "tokenizer"
    if not tokenizer.is_dir():
        train_bpe((path.read_text(encoding="utf-8", errors="ignore") for path in files["train"]), VOCABULARY, tokenizer)
    words = Tokenizer(tokenizer)

    def tokens(paths: list[Path]) -> list[np.ndarray]:
        texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
        return [np.asarray([*ids, words.eod], dtype=np.int64) for ids in words.encode_batch(texts)]

    if not (work / "code.npy").is_file():
        np.save(work / "code.npy", np.concatenate(tokens(files["train"])))
    long, windows = LENGTHS[-1] + 1, []
    for document in tokens(files["held_out"]):
        windows += [document[start : start + long] for start in range(0, len(document) - long + 1, long)]
    return np.load(work / "code.npy"), windows


def batch_of(rows: torch.Tensor, mask: torch.Tensor) -> Batch:
    """rows: [b, s + 1]; mask: [b, s] of the predicted tokens."""
    return Batch(tokens=rows[:, :-1], labels=rows[:, 1:], loss_mask=mask)


def code_batches(tokens: np.ndarray) -> Iterator[Batch]:
    """Random stretches of TRAINED + 1 tokens."""
    rng = np.random.default_rng(1)
    while True:
        starts = rng.integers(0, len(tokens) - TRAINED - 1, BATCH)
        rows = np.stack([tokens[start : start + TRAINED + 1] for start in starts])
        yield batch_of(torch.from_numpy(rows), torch.ones(BATCH, TRAINED))


def recall_row(rng: random.Random, length: int, *, ask_last: int = 0) -> tuple[list[int], list[int]]:
    """A row of the retrieval task: FACTS facts and questions with their answers, each at a random place among words.

    Args:
        ask_last: ask this often, at the end of the row; 0 asks QUESTIONS times, anywhere behind the fact.

    Returns:
        length + 1 tokens, and the places of the questions: the next token is the answer.
    """
    row = [WORD + rng.randrange(WORDS) for _ in range(length + 1)]
    keys, slots, told, asked = rng.sample(range(KEYS), FACTS), length // 2, {}, []
    places = sorted(rng.sample(range(slots - ask_last), FACTS + (0 if ask_last else QUESTIONS)))
    places += range(slots - ask_last, slots)
    for left, slot in zip(range(len(places), 0, -1), places, strict=True):
        untold = FACTS - len(told)
        if untold and (ask_last or not told or left == untold or rng.random() < 2 * untold / left):
            key = keys[len(told)]
            told[key] = rng.randrange(VALUES)
            row[2 * slot] = FACT + key * VALUES + told[key]
        else:
            key = rng.choice(list(told))
            row[2 * slot : 2 * slot + 2] = (ASK + key, VALUE + told[key])
            asked.append(2 * slot)
    return row, asked


def recall_batches() -> Iterator[Batch]:
    """Rows of TRAINED + 1 tokens, of which the answers count."""
    rng = random.Random(1)
    while True:
        rows, mask = [], torch.zeros(BATCH, TRAINED)
        for number in range(BATCH):
            row, asked = recall_row(rng, TRAINED)
            rows.append(row)
            mask[number, asked] = 1.0
        yield batch_of(torch.tensor(rows), mask)


# ----------------------------------------------------------------------------------------------------------- the models


def arch(task: str) -> ModelArch:
    """4 layers of width 128, or for the retrieval task 2."""
    code = task == "code"
    return ModelArch(
        num_layers=4 if code else 2,
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=352,
        vocab_size=VOCABULARY if code else WORD + WORDS,
        init_std=INIT_STD,
    )


def build(model: ModelArch, length: int, ctx: ParallelContext) -> LanguageModel:
    return Engine.build(ModelSpec(arch=model, seq_length=length), ctx).model


def trained(
    task: str, batches: Iterator[Batch], steps: int, work: Path, ctx: ParallelContext
) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    """The weights after `steps` steps of AdamW with a cosine schedule, and (step, loss). Kept in the folder."""
    file, log = work / f"{task}-{steps}.safetensors", work / f"{task}-{steps}.json"
    if not file.is_file():
        spec = ModelSpec(arch=arch(task), seq_length=TRAINED, micro_batch_size=BATCH)
        engine = Engine.build(spec, ctx, optimizer=Optimizer(lr=RATE[task]))
        curve, recent, begun = [], [], time.perf_counter()
        for step in range(1, steps + 1):
            cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
            for group in engine.required_optimizer.param_groups:
                group["lr"] = RATE[task] * min(1.0, step / 100) * cosine
            done = engine.forward_backward(batches, NextToken(), 1)
            engine.update(clip=1.0, grad_norm=math.sqrt(done.grad_square))
            recent.append(float(done.sums["total"] / done.sums["count"]))
            if step % 100 == 0 or step == steps:
                curve.append((step, sum(recent) / len(recent)))
                recent = []
                print(f"{task}: step {step}, loss {curve[-1][1]:.4f}, {time.perf_counter() - begun:.0f} s", flush=True)
        log.write_text(json.dumps(curve))
        save_file({name: p.detach().contiguous() for name, p in engine.model.named_parameters()}, file)
    return load_file(file), json.loads(log.read_text())


def reader(task: str, weights: dict, way: str, length: int, ctx: ParallelContext) -> LanguageModel:
    """The trained model with the positions of one way."""
    model = build(arch(task).model_copy(update={"position": position(way, length)}), length, ctx).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


@torch.no_grad()
def code_losses(model: LanguageModel, windows: list[np.ndarray], length: int) -> list[float]:
    """The mean loss of each stretch of BIN positions. All lengths end at the ends of the windows, on the same tokens."""
    total = torch.zeros(length)
    for window in windows:
        row = torch.from_numpy(window[-length - 1 :])[None]
        total += model(row[:, :-1], None, None, labels=row[:, 1:])[0]
    return (total / len(windows)).view(-1, BIN).mean(-1).tolist()


@torch.no_grad()
def recall_share(model: LanguageModel, length: int, rows: int) -> float:
    """The share of right answers, 8 a row, asked at the end of the row."""
    rng, right, asked = random.Random(1), 0, 0
    for _ in range(rows):
        row, places = recall_row(rng, length, ask_last=8)
        tokens = torch.tensor([row])
        answers = model(tokens[:, :-1], None, None)[0, places, : WORD + WORDS].argmax(-1)
        right += int((answers == tokens[0, [place + 1 for place in places]]).sum())
        asked += len(places)
    return right / asked


def perplexity(losses: list[float]) -> float:
    """Of the last 256 tokens."""
    return math.exp(np.mean(losses[-256 // BIN :]))


def measure(options: argparse.Namespace, ctx: ParallelContext) -> dict:
    """Both models' results by way and length: {"code": {way: {length: [loss, ...]}}, "recall": {way: {length: share}}}.

    The lengths are text, as JSON has them.
    """
    work = options.work
    tokens, windows = code_tokens(work)
    windows = random.Random(0).sample(windows, min(options.windows, len(windows)))
    print(f"{len(tokens):,} tokens to learn from, {len(windows)} held-out windows of {LENGTHS[-1]} tokens", flush=True)
    models = {
        "code": trained("code", code_batches(tokens), options.code_steps, work, ctx),
        "recall": trained("recall", recall_batches(), options.recall_steps, work, ctx),
    }
    tests: dict[str, Callable] = {
        "code": lambda model, length: code_losses(model, windows, length),
        "recall": lambda model, length: recall_share(model, length, options.rows),
    }
    file = work / f"results-{options.code_steps}-{options.recall_steps}.json"
    results = json.loads(file.read_text()) if file.is_file() else {task: {way: {} for way in WAYS} for task in tests}
    for task, way, length in itertools.product(tests, WAYS, LENGTHS):
        kept = results[task][way]
        if str(length) not in kept:
            kept[str(length)] = tests[task](reader(task, models[task][0], way, length, ctx), length)
            file.write_text(json.dumps(results) + "\n")
            found = kept[str(length)]
            shown = (
                f"{100 * found:.1f} % right" if task == "recall" else f"perplexity {perplexity(found):.2f} at the end"
            )
            print(f"{task}, {way}, {length}: {shown}", flush=True)
    return results


# ---------------------------------------------------------------------------------------------------- tables and plot


def tables(results: dict) -> str:
    """Perplexity of the same 256 tokens at the end of texts of each length, and the share of right answers."""
    heads = "".join(f" {length:,} |" for length in LENGTHS)
    rule = "|---|" + "---|" * len(LENGTHS)
    lines = [f"| perplexity, read at |{heads}", rule]
    for way in WAYS:
        ends = [perplexity(results["code"][way][str(length)]) for length in LENGTHS]
        lines.append(f"| {way} |" + "".join(f" {end:.2f} |" for end in ends))
    lines += ["", f"| right answers at |{heads}", rule]
    for way in WAYS:
        shares = [results["recall"][way][str(length)] for length in LENGTHS]
        lines.append(f"| {way} |" + "".join(f" {100 * share:.1f} % |" for share in shares))
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Above: perplexity by position in texts of the longest length. Below: right answers by length."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(5, 7.4), layout="constrained")
    lines = [("0.4", ":"), ("C1", "-"), ("C2", "-"), ("C3", "-"), ("C0", "-"), ("C9", "--")]
    longest = LENGTHS[-1]
    for way, (color, dash) in zip(WAYS, lines, strict=True):
        losses = results["code"][way][str(longest)]
        places = [BIN * (n + 0.5) for n in range(len(losses))]
        above.plot(places, np.exp(losses), color=color, ls=dash, lw=2, label=way)
        shares = [100 * results["recall"][way][str(length)] for length in LENGTHS]
        below.plot(LENGTHS, shares, color=color, ls=dash, lw=2, marker="o", markersize=5)
    above.axvline(TRAINED, color="k", lw=1)
    above.set(
        yscale="log", xlabel="position (tokens)", ylabel="perplexity", title=f"Code, read {longest:,} tokens long"
    )
    above.set_yticks([40, 50, 70, 100, 150], ["40", "50", "70", "100", "150"])
    below.set(xscale="log", xlabel="length (tokens)", ylabel="right answers (%)", title="Retrieval", ylim=(-3, 103))
    below.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    for axes in (above, below):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(15)
        axes.xaxis.label.set_fontsize(14)
        axes.yaxis.label.set_fontsize(14)
        axes.tick_params(labelsize=13)
    figure.legend(loc="outside lower center", fontsize=13, ncols=2)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("long_context"))
    parser.add_argument("--code-steps", type=int, default=1800)
    parser.add_argument("--recall-steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=32, help="held-out texts that each way reads")
    parser.add_argument("--rows", type=int, default=50, help="rows of the retrieval task, of 8 questions each")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with parallel_context(Parallel()) as ctx:
        results = measure(options, ctx)
    print(tables(results))
    plot(results, options.work / "long_context.png")


if __name__ == "__main__":
    main()
