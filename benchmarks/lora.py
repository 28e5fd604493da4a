"""Compares a LoRA training step with a full one, and with peft and transformers, alternating in one process.

    python benchmarks/lora.py [--threads 1] [--rounds 7] [--rank 16] [--json FILE]

All have the same model, batch, precision (fp32), threads and data. peft has adapters of the same rank beside the same
matrices, and the same optimizer for them; its q, k and v (gate and up) have an A each. The script prints the
median step time of each, the medians of the ratios of consecutive steps, and the bytes of gradients and optimizer states.
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

from flagscale_like.errors import required

os.environ.setdefault("FLAGSCALE_LIKE_DEVICE", "cpu")

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flagscale_like.config import Parallel, RunConfig
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.engine.engine import Engine
from flagscale_like.families import find_family
from flagscale_like.model.spec import ModelSpec
from flagscale_like.recipes.benchmark import our_steps
from flagscale_like.runtime.parallel import ParallelContext, parallel_context

MODEL = {
    "num_layers": 4,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "ffn_hidden_size": 2752,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(config: RunConfig, ctx: ParallelContext) -> Callable[[], float]:
    steps = our_steps(config, ctx)
    return lambda: next(steps)


def peft_step(config: RunConfig, ctx: ParallelContext) -> Callable[[], float]:
    values = find_family("llama").hf_config(config.model)
    hf = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa", dtype=torch.float32)
    lora, options = required(config.lora, "lora"), config.optimizer
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(options.beta1, options.beta2), fused=True)
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
        torch.nn.utils.clip_grad_norm_(trained, options.clip_grad)
        optimizer.step()
        return total

    return step


def trained_bytes(config: RunConfig, ctx: ParallelContext) -> int:
    """Bytes of gradients, master weights and optimizer states."""
    engine = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer)
    return engine.state_bytes() - sum(p.nbytes for model in engine.models for p in model.parameters())


def run_config(lora: dict | None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": MODEL,
            "train": {
                "steps": 1000,
                "micro_batch_size": 4,
                "global_batch_size": 4,
                "seq_length": 256,
                "precision": "fp32",
            },
            "optimizer": {"lr": 1e-4},
            "data": {"synthetic": True},
            "lora": lora,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    full, lora = run_config(None), run_config({"rank": args.rank, "alpha": 2 * args.rank})
    times: dict[str, list[float]] = {"full": [], "LoRA": [], "peft": []}
    with parallel_context(Parallel()) as ctx:
        steps = {"full": ours(full, ctx), "LoRA": ours(lora, ctx), "peft": peft_step(lora, ctx)}
        for round_number in range(args.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if round_number:  # the first round is the warm-up
                    times[name].append(time.perf_counter() - began)
        del steps
        states = trained_bytes(lora, ctx) / trained_bytes(full, ctx)
    tokens = lora.train.global_batch_size * lora.train.seq_length
    result = {
        "threads": args.threads,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "parameters": lora.describe_parameters(),
        "lora_over_full": statistics.median(a / b for a, b in zip(times["LoRA"], times["full"], strict=True)),
        "speed_over_peft": statistics.median(b / a for a, b in zip(times["LoRA"], times["peft"], strict=True)),
        "flops_over_full": lora.flops_per_token() / full.flops_per_token(),
        "states_over_full": states,
    }
    print(f"{result['parameters']}, rank {args.rank}, {tokens} tokens a step, {args.threads} threads, fp32")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        result[name] = {"median_s": median, "tokens_per_s": tokens / median}
        print(
            f"{name:<6} {median:.3f} s a step (from {min(seconds):.3f} to {max(seconds):.3f}), "
            f"{tokens / median:,.0f} tokens/s"
        )
    print(f"step time LoRA / full: {result['lora_over_full']:.2f} (FLOPs: {result['flops_over_full']:.2f})")
    print(f"tokens/s LoRA / peft with transformers: {result['speed_over_peft']:.2f} (medians of {args.rounds} pairs)")
    print(f"gradients and optimizer states LoRA / full: {states:.2%}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
