"""Measures fine-tuning on conversations: packs against padded rows, and against trl's SFTTrainer, alternating in one process.

    python benchmarks/sft.py [--rounds 5] [--steps 6] [--trl] [--json FILE]

Conversations of 24 to 500 tokens (most are short) are rendered by a chat template with {% generation %} marks. All sides have
the same model (fp32, random weights), rows of 512 places and rows in a step.

- packed: packs, as training reads them. padded: each conversation in a row of its own, as one document.
  The measure is the tokens that count a second; packing can gain the ratio of the two fills. It gains the share of it that
  a row of packs takes no longer than a padded one.
- trl (--trl; needs `pip install trl`): SFTTrainer with packing, assistant_only_loss and fused AdamW.
  The measure is the tokens of conversations a second, padding not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flagscale_like.config import RunConfig
from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.chat import copy_with_template
from flagscale_like.data.packing import ConversationSource, pack_row
from flagscale_like.data.preprocess import preprocess_chat
from flagscale_like.data.pretrain import build_dataset
from flagscale_like.data.shards import ChatOptions
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.engine.engine import Engine
from flagscale_like.families import find_family
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import ParallelContext, parallel_context
from flagscale_like.runtime.reduction import NamedSum

PLACES, ROWS, CONVERSATIONS = 512, 4, 1000
TEMPLATE = Path(__file__).parents[1] / "examples/sft/templates/plain.jinja"
MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 688,
    "vocab_size": 2048,
    "max_position_embeddings": PLACES,
}


def make_data(folder: Path) -> list[dict[str, Any]]:
    """Write the conversations, their tokenizer and the source that training reads."""
    draw = random.Random(0)
    words = [
        "the",
        "a",
        "model",
        "layer",
        "step",
        "token",
        "loss",
        "rank",
        "why",
        "what",
        "reads",
        "learns",
        "of",
        "and",
    ]

    def sentence(most: int) -> str:
        return " ".join(draw.choices(words, k=min(most, max(2, int(draw.lognormvariate(3.2, 0.9))))))

    chats = [
        [{"role": "user", "content": sentence(120)}, {"role": "assistant", "content": sentence(300)}]
        for _ in range(CONVERSATIONS)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    train_bpe((message["content"] for chat in chats for message in chat), 512, folder / "plain")
    copy_with_template(folder / "plain", TEMPLATE.read_text(), folder / "tok")
    options = ChatOptions(TEMPLATE.read_text(), length=PLACES, long="drop")
    preprocess_chat([folder / "chats.jsonl"], folder / "tok", folder / "chats", options)
    return [{"messages": chat} for chat in chats]


class Ours:
    """Steps of flagscale_like on one kind of rows: packs, or each conversation in a row of its own, as one document."""

    def __init__(self, config: RunConfig, ctx: ParallelContext, *, packed: bool) -> None:
        self.ctx, self.packed, self.objective = ctx, packed, NextToken(packed=packed)
        self.engine = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer)
        self.size, self.places = config.train.micro_batch_size, 0
        data = build_dataset(config, ctx, "train", 4096)
        assert isinstance(data, ConversationSource), "the benchmark has one source, of conversations"
        self.data = data
        self.batches = self._batches()

    def _batches(self) -> Iterator[Batch]:
        alone = itertools.cycle([number] for number in self.data.members.tolist())
        rows = map(self.data.members_of, itertools.count()) if self.packed else alone
        while True:
            taken = list(itertools.islice(rows, self.size))
            self.places += sum(int(self.data.dataset.sequence_lengths[n]) - 1 for row in taken for n in row)
            made = [
                pack_row([(self.data.dataset.get(n), self.data.weights.get(n)) for n in row], PLACES, pad=0)
                for row in taken
            ]
            if not self.packed:
                made = [{name: value for name, value in row.items() if name != "documents"} for row in made]
            yield Batch.of(collate(made), self.ctx.platform.device)

    def steps(self, count: int) -> tuple[float, float, int]:
        """Seconds, tokens that counted, and places that conversations took, of some steps."""
        counted, self.places, began = 0.0, 0, time.perf_counter()
        for _ in range(count):
            outputs = self.engine.forward_backward(self.batches, self.objective, ROWS // self.size)
            sums = NamedSum(self.ctx)({"square": outputs.grad_square, **outputs.sums})
            self.engine.update(clip=1.0, grad_norm=sums["square"] ** 0.5)
            counted += sums["count"]
        return time.perf_counter() - began, counted, self.places


def trl_rate(chats: list[dict[str, Any]], folder: Path, config: RunConfig, steps: int) -> float:
    """Tokens of conversations a second of trl's SFTTrainer, after a first step."""
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    times: list[float] = []
    seen: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            times.append(time.perf_counter())
            seen.append(int(state.num_input_tokens_seen))

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**find_family("llama").hf_config(config.model)))
    options = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps + 1,
        per_device_train_batch_size=config.train.micro_batch_size,
        gradient_accumulation_steps=ROWS // config.train.micro_batch_size,
        max_length=PLACES,
        packing=True,
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=config.optimizer.lr,
        lr_scheduler_type="constant",
        include_num_input_tokens_seen="all",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    words = AutoTokenizer.from_pretrained(folder / "tok")
    words.pad_token = words.eos_token
    trainer = SFTTrainer(
        model=model, args=options, train_dataset=Dataset.from_list(chats), processing_class=words, callbacks=[Clock()]
    )
    trainer.train()
    return (seen[-1] - seen[0]) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of each side in a round")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--trl", action="store_true", help="also measure trl's SFTTrainer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = make_data(folder)
        config = RunConfig.model_validate(
            {
                "run_dir": str(folder / "run"),
                "model": MODEL,
                "train": {
                    "steps": 1000,
                    "micro_batch_size": args.micro_batch_size,
                    "global_batch_size": ROWS,
                    "seq_length": PLACES,
                    "precision": "fp32",
                },
                "optimizer": {"lr": 1e-3},
                "data": {
                    "sources": [{"path": str(folder / "chats")}],
                    "tokenizer": str(folder / "tok"),
                    "split": "1,0,0",
                },
            }
        )
        with parallel_context(config.parallel) as ctx:
            sides = {"packed": Ours(config, ctx, packed=True), "padded": Ours(config, ctx, packed=False)}
            rates: dict[str, list[float]] = {"packed": [], "padded": [], "packed tokens": [], "trl tokens": []}
            times: dict[str, list[float]] = {"packed": [], "padded": []}
            taken = dict.fromkeys(sides, 0)
            for side in sides.values():
                side.steps(1)
            for turn in range(args.rounds):
                for label, side in sides.items():
                    seconds, counted, places = side.steps(args.steps)
                    rates[label].append(counted / seconds)
                    taken[label] += places
                    times[label].append(seconds)
                    if label == "packed":
                        rates["packed tokens"].append(places / seconds)
                if args.trl:
                    rates["trl tokens"].append(trl_rate(chats, folder, config, args.steps))
                print(
                    f"round {turn + 1}: " + ", ".join(f"{n} {r[-1]:,.0f}/s" for n, r in rates.items() if r), flush=True
                )
    fills = {label: places / (args.rounds * args.steps * ROWS * PLACES) for label, places in taken.items()}
    rows = statistics.median(b / a for a, b in zip(times["packed"], times["padded"], strict=True))
    counted = {label: statistics.median(rates[label]) for label in sides}
    result: dict[str, Any] = {
        "counted tokens/s": {label: round(rate) for label, rate in counted.items()},
        "counted tokens/s, packed : padded": round(counted["packed"] / counted["padded"], 3),
        "fill": {label: round(fill, 4) for label, fill in fills.items()},
        "ratio of fills": round(fills["packed"] / fills["padded"], 3),
        "rows/s, packed : padded (share of the ratio of fills)": round(rows, 3),
    }
    if args.trl:
        import trl

        pairs = zip(rates["packed tokens"], rates["trl tokens"], strict=True)
        result |= {
            "trl": trl.__version__,
            "tokens/s": {side: round(statistics.median(rates[f"{side} tokens"])) for side in ("packed", "trl")},
            "packed : trl": round(statistics.median(a / b for a, b in pairs), 3),
        }
    for label, value in result.items():
        print(f"{label}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
