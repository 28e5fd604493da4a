"""Compares a training step of flagscale_like with a step of transformers' LlamaForCausalLM, alternating in one process.

    python benchmarks/cpu_step.py [--threads 2] [--rounds 7] [--json FILE]

Both models have the same shape, batch, precision (fp32), threads and data. transformers uses SDPA and torch's fused
AdamW. The script prints the median step time of both, the median of the ratios of consecutive steps, and the share of the
GEMM rate that each reaches. The GEMM rate is that of this process on the feed-forward product of the model. FLOPs are
those of ModelArch.flops_per_token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flagscale_like.config import Parallel, RunConfig
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.families import find_family
from flagscale_like.recipes.benchmark import our_steps
from flagscale_like.runtime.parallel import ParallelContext, parallel_context

MODEL = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 1376,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}


def flagscale_step(config: RunConfig, ctx: ParallelContext) -> Callable[[], float]:
    steps = our_steps(config, ctx)
    return lambda: next(steps)


def transformers_step(config: RunConfig, ctx: ParallelContext) -> Callable[[], float]:
    values = find_family("llama").hf_config(config.model)
    hf = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa", dtype=torch.float32)
    options = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(options.beta1, options.beta2), fused=True)
    data, _ = build_datasets(config, ctx, train_samples=config.train.total_samples(), valid_samples=0)
    batches = micro_batches(data, config, ctx)
    count = config.train.global_batch_size // config.train.micro_batch_size

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in itertools.islice(batches, count):
            logits = model(input_ids=batch.tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        return total

    return step


def gemm_flops(config: RunConfig, seconds: float = 2.0) -> float:
    """Measure the FLOP/s of [tokens, h] x [h, 2f], the largest matrix product of a layer."""
    arch, train = config.model, config.train
    a = torch.randn(train.micro_batch_size * train.seq_length, arch.hidden_size)
    b = torch.randn(arch.hidden_size, 2 * arch.ffn_hidden_size)
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        rates.append(2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - began))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": MODEL,
            "train": {
                "steps": 1000,
                "micro_batch_size": 4,
                "global_batch_size": 8,
                "seq_length": 256,
                "precision": "fp32",
            },
            "optimizer": {"lr": 1e-4},
            "data": {"synthetic": True},
        }
    )
    times: dict[str, list[float]] = {"flagscale_like": [], "transformers": []}
    with parallel_context(Parallel()) as ctx:
        steps = {"flagscale_like": flagscale_step(config, ctx), "transformers": transformers_step(config, ctx)}
        for round_number in range(args.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if round_number:  # the first round is the warm-up
                    times[name].append(time.perf_counter() - began)
    rate = gemm_flops(config)
    tokens = config.train.global_batch_size * config.train.seq_length
    flops = config.model.flops_per_token(config.train.seq_length, causal=True) * tokens
    result = {
        "threads": args.threads,
        "torch": torch.__version__,
        "tokens_per_step": tokens,
        "parameters": config.model.parameter_count(),
        "gemm_gflops": rate / 1e9,
        "speed_ratio": statistics.median(
            theirs / mine for mine, theirs in zip(times["flagscale_like"], times["transformers"], strict=True)
        ),
    }
    print(f"{result['parameters']:,} parameters, {tokens} tokens a step, {args.threads} threads, fp32")
    print(f"GEMM rate {rate / 1e9:.1f} GFLOP/s")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        result[name] = {"median_s": median, "tokens_per_s": tokens / median, "share_of_gemm": flops / median / rate}
        print(
            f"{name:<14} {median:.3f} s a step (from {min(seconds):.3f} to {max(seconds):.3f}), "
            f"{tokens / median:,.0f} tokens/s, {flops / median / rate:.0%} of the GEMM rate"
        )
    print(f"flagscale_like / transformers in tokens/s: {result['speed_ratio']:.2f} (median of {args.rounds} pairs)")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
