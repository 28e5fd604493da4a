"""Compares experts as one grouped product with a loop over them, and a step with experts with a dense one.

    python benchmarks/experts.py [--threads 1] [--rounds 7] [--tokens 2048] [--precision fp32] [--json FILE]

1. Forward and backward of the experts alone: model.experts.GroupedExperts, megatron-core's SequentialMLP, and a bare loop of
   matrix products over the experts, with the same weights and tokens, in turns.
2. A training step of a model with experts against that of a dense model whose FFN is as wide as a token's experts together:
   the same active FLOPs but for the router, in turns.

The script prints medians of the ratios of consecutive rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")

import torch
import torch.nn.functional as F

from flagscale_like.runtime.parallel import ParallelContext, parallel_context  # before megatron-core

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.transformer import ModuleSpec  # isort: skip
from megatron.core.transformer.mlp import MLPSubmodules  # isort: skip
from megatron.core.transformer.moe.experts import SequentialMLP  # isort: skip

from flagscale_kernels import swiglu
from flagscale_like.config import Parallel, RunConfig
from flagscale_like.engine.engine import Engine
from flagscale_like.model.experts import ExpertLayer, GroupedExperts
from flagscale_like.model.modules import SwiGLU
from flagscale_like.model.spec import ModelSpec
from flagscale_like.recipes.benchmark import our_steps

HIDDEN, TOP_K = 256, 2
# Experts, and the width of each: together as many parameters.
SIZES = ((8, 512), (16, 256), (32, 128), (64, 64), (128, 32))


def run_config(experts: dict | None, ffn: int, precision: str) -> RunConfig:
    model = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": ffn,
        "vocab_size": 4096,
        "experts": experts,
    }
    train = {"steps": 1000, "micro_batch_size": 8, "global_batch_size": 8, "seq_length": 256, "precision": precision}
    return RunConfig.model_validate(
        {"run_dir": "unused", "model": model, "train": train, "optimizer": {"lr": 1e-4}, "data": {"synthetic": True}}
    )


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, a round after the other; the first round is the warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """The median of the ratios of consecutive rounds."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def looped(module: GroupedExperts, x: torch.Tensor, counts: list[int], probs: torch.Tensor) -> torch.Tensor:
    """One expert after the other, with the weights of a GroupedExperts."""
    fc1, fc2 = module.linear_fc1.weight, module.linear_fc2.weight
    parts = zip(x.split(counts), fc1, fc2, probs.split(counts), strict=True)
    return torch.cat([F.linear(swiglu(F.linear(tokens, a), weight=p), b) for tokens, a, b, p in parts])


def sequential(module: GroupedExperts, layer: ExpertLayer) -> SequentialMLP:
    """megatron-core's experts with the weights of a GroupedExperts."""
    parts = MLPSubmodules(
        linear_fc1=ColumnParallelLinear,
        activation_func=ModuleSpec(module=SwiGLU),
        linear_fc2=RowParallelLinear,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = copy.copy(layer.config)
    config.gradient_accumulation_fusion = False  # there are no gradient buffers here
    made = SequentialMLP(layer.num_local_experts, config, parts, pg_collection=groups)
    with torch.no_grad():
        for index, expert in enumerate(made.local_experts):
            expert.linear_fc1.weight.copy_(module.linear_fc1.weight[index])
            expert.linear_fc2.weight.copy_(module.linear_fc2.weight[index])
    return made


def grouped_against_loops(
    size: tuple[int, int], tokens: int, rounds: int, precision: str, ctx: ParallelContext
) -> tuple[float, float]:
    """Seconds of megatron-core's SequentialMLP, and of a bare loop, over the grouped product's; forward and backward."""
    count, width = size
    config = run_config({"count": count, "top_k": TOP_K, "ffn_hidden_size": width}, 4 * HIDDEN, precision)
    layer = Engine.build(ModelSpec.of(config), ctx).model.decoder.layers[0].mlp
    module, megatron = layer.experts, sequential(layer.experts, layer)
    dtype = module.linear_fc1.weight.dtype
    chosen = torch.randint(0, count, (tokens * TOP_K,), generator=torch.Generator().manual_seed(1))
    counts = chosen.bincount(minlength=count)
    x = torch.randn(tokens * TOP_K, HIDDEN).to(dtype).requires_grad_()
    probs = torch.rand(tokens * TOP_K).requires_grad_()

    def run(forward: Callable[[], torch.Tensor]) -> None:
        output = forward()
        output.backward(torch.ones_like(output))
        module.zero_grad()
        megatron.zero_grad()

    steps = {
        "megatron": lambda: run(lambda: megatron(x, counts, probs)[0]),
        "loop": lambda: run(lambda: looped(module, x, counts.tolist(), probs)),
        "grouped": lambda: run(lambda: module(x, counts, probs)[0]),
    }
    times = in_turns(steps, rounds)
    return ratio(times, "megatron", "grouped"), ratio(times, "loop", "grouped")


def experts_against_dense(rounds: int, precision: str, ctx: ParallelContext) -> dict[str, float]:
    """tokens/s of a step with 16 experts, 2 for each token, over that of a dense model; and FLOPs and parameters over its."""
    width = 512
    sparse = run_config({"count": 16, "top_k": TOP_K, "ffn_hidden_size": width}, TOP_K * width, precision)
    dense = run_config(None, TOP_K * width, precision)
    iterators = {name: our_steps(config, ctx) for name, config in (("dense", dense), ("experts", sparse))}
    times = in_turns({name: lambda steps=steps: next(steps) for name, steps in iterators.items()}, rounds)
    return {
        "speed_over_dense": ratio(times, "dense", "experts"),
        "flops_over_dense": sparse.flops_per_token() / dense.flops_per_token(),
        "parameters_over_dense": sparse.model.parameter_count() / dense.model.parameter_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the first comparison")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, object] = {"threads": args.threads, "torch": torch.__version__, "precision": args.precision}
    with parallel_context(Parallel()) as ctx:
        print(
            f"{args.tokens} tokens to {TOP_K} experts each, hidden size {HIDDEN}, {args.threads} threads, {args.precision}"
        )
        for count, width in SIZES:
            megatron, loop = grouped_against_loops((count, width), args.tokens, args.rounds, args.precision, ctx)
            result |= {f"megatron_over_grouped_{count}": megatron, f"loop_over_grouped_{count}": loop}
            print(
                f"{count:>4} experts of width {width:>3}: the grouped product is {megatron:.2f} times as fast as "
                f"SequentialMLP, {loop:.2f} times as a bare loop"
            )
        step = experts_against_dense(args.rounds, args.precision, ctx)
        result |= step
        print(
            f"a step with 16 experts, 2 for each token: {step['speed_over_dense']:.2f} of the dense step's tokens/s, at "
            f"{step['flops_over_dense']:.3f} of its FLOPs and {step['parameters_over_dense']:.1f} times its parameters"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
