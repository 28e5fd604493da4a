"""Compares generation by our own engine with transformers' generate, at texts of mixed lengths.

    python benchmarks/generation.py [--texts 128] [--rows 32] [--rounds 3] [--threads 1] [--json FILE]

Each text has its own prompt, of 4 to 63 tokens, and its own number of new tokens, 8 to 188, of which most are short: as
rollouts are. Three ways draw them with the same weights, in turns:

    engine       OwnEngine, `rows` texts at a time; a text that ends makes room for the next
    padded       transformers' generate, batches of `rows` texts padded on the left, each until its last text has ended
    one by one   OwnEngine, a text at a time

The script prints tokens a second and the medians of the ratios of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")

import torch

from flagscale_like.runtime.parallel import parallel_context  # before transformers and megatron-core

from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList  # isort: skip

from flagscale_like.arch import ModelArch
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.families import find_family
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.model.build import named_shards
from flagscale_like.model.spec import ModelSpec

ARCH = ModelArch(
    num_layers=4, hidden_size=256, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=704, vocab_size=2000
)


def asked(texts: int) -> tuple[list[list[int]], list[int]]:
    """The prompts, and how many new tokens each gets."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 64, (texts,), generator=generator).tolist()
    prompts = [torch.randint(3, ARCH.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return prompts, [int(x) for x in torch.rand(texts, generator=generator) ** 3 * 180 + 8]


def by_engine(own: OwnEngine, prompts: Sequence[list[int]], want: Sequence[int]) -> None:
    """All texts, through one schedule: each has its own length, as a stop token would make it."""
    asked = [(Prompt(p, i), Sampling(n)) for i, (p, n) in enumerate(zip(prompts, want, strict=True))]
    assert sum(len(rollout.ids) for rollout in own.generate_each(asked)) == sum(want)


class Enough(StoppingCriteria):
    """Ends each text of a batch at its own length."""

    def __init__(self, width: int, want: Sequence[int]) -> None:
        self.width, self.want = width, torch.tensor(want)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return input_ids.shape[1] - self.width >= self.want


def padded(model: LlamaForCausalLM, prompts: Sequence[list[int]], want: Sequence[int], rows: int) -> None:
    for at in range(0, len(prompts), rows):
        some, width = prompts[at : at + rows], max(map(len, prompts[at : at + rows]))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=max(want),
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([Enough(width, want[at : at + rows])]),
        )


def as_llama(engine: Engine) -> LlamaForCausalLM:
    """transformers' model with the engine's weights."""
    family, shards = find_family("llama"), named_shards(engine.model)
    model = LlamaForCausalLM(LlamaConfig(**family.hf_config(ARCH))).eval()
    weights = {}
    for rule in family.rules(ARCH):
        weights |= dict(zip(rule.hf, rule.to_hf(shards[rule.core].detach(), ARCH), strict=True))
    model.load_state_dict(weights)
    return model


def measure(texts: int, rows: int, rounds: int) -> dict[str, float]:
    prompts, want = asked(texts)
    with parallel_context(Parallel(), alone=True) as ctx:
        engine = Engine.build(ModelSpec(arch=ARCH, seq_length=512), ctx)
        model, many, one = as_llama(engine), OwnEngine(engine, rows=rows), OwnEngine(engine, rows=1)
        ways: dict[str, Callable[[], None]] = {
            "engine": lambda: by_engine(many, prompts, want),
            "padded": lambda: padded(model, prompts, want, rows),
            "one by one": lambda: by_engine(one, prompts, want),
        }
        for way in ways.values():
            way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    found = {f"tokens/s, {name}": sum(want) / statistics.median(times) for name, times in seconds.items()}
    for name in ("padded", "one by one"):
        ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["engine"], strict=True)]
        found[f"engine over {name}"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.texts, options.rows, options.rounds)
    for name, value in found.items():
        print(f"{name:28} {value:10.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
