"""Measures contrastive training against sentence-transformers, alternating in one process, and its memory by batch.

    python benchmarks/contrastive.py [--rounds 5] [--queries 32] [--json FILE]      needs `pip install sentence-transformers`
    python benchmarks/contrastive.py --memory [--json FILE]

Groups of a query (4 to 40 tokens), a positive and three hard negatives (8 to 250 tokens, most are short). Both sides train
the same model (fp32) from the same weights on the same groups, by gradient caching, with in-batch and hard negatives:

- ours: packs of 1024 places, a pack in a micro-batch.
- sentence-transformers: its CachedMultipleNegativesRankingLoss on texts that are tokens already, last-token pooling, fused
  AdamW and a clipped gradient, without its trainer. Its mini-batches drop the padding that all their texts have. Of several
  sizes of them, the fastest counts.

The measure is queries a second, data preparation not counted. Before, both compute the loss of one batch: the same number.

--memory trains one step of each of three batches, each in a process of its own, and reports its peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Contrastive, Optimizer, Parallel
from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.group_source import pack_texts
from flagscale_like.data.packing import best_fit_decreasing
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.engine.engine import Engine
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.contrastive import ContrastiveLoss
from flagscale_like.runtime.parallel import ParallelContext, parallel_context
from flagscale_like.runtime.reduction import NamedSum

PLACES, PASSAGES, TEMPERATURE, VOCABULARY = 1024, 4, 0.05, 2048
MINI_BATCHES = (4, 8, 16)  # texts
MEMORY_QUERIES = (16, 64, 256)
MODEL = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 1024,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": PLACES,
}

Group = list[np.ndarray]  # the tokens of a query and its passages


def make_groups(count: int, seed: int) -> list[Group]:
    """Groups of random tokens; the lengths are log-normal."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)

    def text(median: float, low: int, high: int) -> np.ndarray:
        length = min(high, max(low, round(draw.lognormvariate(np.log(median), 0.8))))
        return numbers.integers(3, VOCABULARY, length)

    return [[text(12, 4, 40), *(text(48, 8, 250) for _ in range(PASSAGES))] for _ in range(count)]


def make_model(folder: Path) -> Path:
    """A Hugging Face folder of random weights with a tokenizer, which sentence-transformers wants."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL, use_cache=False)).save_pretrained(folder)
    train_bpe(["a b c d e f g"] * 10, 300, folder)
    return folder


class Ours:
    """Steps of flagscale_like on packs."""

    def __init__(self, folder: Path, ctx: ParallelContext) -> None:
        self.ctx = ctx
        source = HfFolder(folder)
        spec = ModelSpec(arch=source.arch, head="hidden", seq_length=PLACES)
        self.engine = Engine.build(spec, ctx, optimizer=Optimizer(lr=1e-4), source=source)
        options = Contrastive(kind="contrastive", passages=PASSAGES, temperature=TEMPERATURE)
        self.objective = ContrastiveLoss(options)

    def batches(self, groups: Sequence[Group]) -> list[Batch]:
        """The groups as micro-batches of one pack."""
        rows = best_fit_decreasing([sum(map(len, group)) for group in groups], PLACES)
        packs = [pack_texts([text for number in row for text in groups[number]], PLACES, pad=0) for row in rows]
        return [Batch.of(collate([pack]), self.ctx.platform.device) for pack in packs]

    def step(self, batches: list[Batch]) -> float:
        """The mean loss of a step."""
        outputs = self.engine.forward_backward(iter(batches), self.objective, len(batches))
        sums = NamedSum(self.ctx)({"square": outputs.grad_square, **outputs.sums})
        self.engine.update(clip=1.0, grad_norm=sums["square"] ** 0.5)
        return sums["total"] / sums["count"]


class Theirs:
    """Steps of sentence-transformers on the same groups."""

    def __init__(self, folder: Path, mini_batch: int) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        modules = [Transformer(str(folder)), Pooling(MODEL["hidden_size"], pooling_mode="lasttoken"), Normalize()]
        self.model = SentenceTransformer(modules=modules, device="cpu").train()
        options = {"scale": 1 / TEMPERATURE, "mini_batch_size": mini_batch}
        self.loss = CachedMultipleNegativesRankingLoss(self.model, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def batches(self, groups: Sequence[Group]) -> list[dict[str, Tensor]]:
        """The queries, the positives, and each of the negatives, padded to their longest."""
        return [self._padded([group[place] for group in groups]) for place in range(1 + PASSAGES)]

    def _padded(self, texts: Sequence[np.ndarray]) -> dict[str, Tensor]:
        longest = max(map(len, texts))
        ids, mask = (torch.zeros(len(texts), longest, dtype=torch.int64) for _ in range(2))
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
        return {"input_ids": ids, "attention_mask": mask}

    def step(self, batches: list[dict[str, Tensor]]) -> float:
        """The mean loss of a step."""
        self.optimizer.zero_grad()
        loss = self.loss([dict(features) for features in batches], None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def compare(rounds: int, queries: int) -> dict[str, Any]:
    """Queries a second of both sides, in turn."""
    import sentence_transformers

    with tempfile.TemporaryDirectory() as name, parallel_context(Parallel()) as ctx:
        folder = make_model(Path(name))
        sides: dict[str, Any] = {"ours": Ours(folder, ctx)}  # what a side makes of the groups, it alone reads
        sides |= {f"theirs, mini-batch {size}": Theirs(folder, size) for size in MINI_BATCHES}
        first = make_groups(queries, 0)
        losses = {name: side.step(side.batches(first)) for name, side in sides.items()}  # and warms up
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            groups = make_groups(queries, 1 + turn)
            for name, side in sides.items():
                batches = side.batches(groups)
                began = time.perf_counter()
                side.step(batches)
                rates[name].append(queries / (time.perf_counter() - began))
            print(f"round {turn + 1}: " + ", ".join(f"{n} {r[-1]:.2f}/s" for n, r in rates.items()), flush=True)
        fill = sum(len(text) for group in first for text in group) / (len(sides["ours"].batches(first)) * PLACES)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max((name for name in sides if name != "ours"), key=medians.__getitem__)
    ratios = sorted(a / b for a, b in zip(rates["ours"], rates[best], strict=True))
    return {
        "sentence-transformers": sentence_transformers.__version__,
        "loss of the first batch": {name: round(loss, 5) for name, loss in losses.items()},
        "queries/s": {name: round(rate, 2) for name, rate in medians.items()},
        "fill of the packs": round(fill, 3),
        f"ours : {best}": round(statistics.median(ratios), 3),
        "of the rounds": [round(ratio, 3) for ratio in ratios],
    }


def memory(queries: int) -> dict[str, float]:
    """The peak of resident memory of one step, and what the process held before it, in MiB."""

    def held(name: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) / 1024

    with tempfile.TemporaryDirectory() as name, parallel_context(Parallel()) as ctx:
        ours = Ours(make_model(Path(name)), ctx)
        ours.step(ours.batches(make_groups(8, 0)))  # gradients and the optimizer's states are there
        before = held("VmRSS")
        ours.step(ours.batches(make_groups(queries, 1)))
        return {"queries": queries, "before": before, "peak": held("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=32, help="of a batch")
    parser.add_argument("--memory", action="store_true", help="measure the memory of three batches instead")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.memory_of:
        print(json.dumps(memory(args.memory_of)))
        return
    result: dict[str, Any]
    if args.memory:
        result = {}
        for queries in MEMORY_QUERIES:
            command = [sys.executable, __file__, "--memory-of", str(queries)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            result[f"{queries} queries"] = f"{found['peak']:,.0f} MiB, {found['before']:,.0f} before the step"
    else:
        result = compare(args.rounds, args.queries)
    for label, value in result.items():
        print(f"{label}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
