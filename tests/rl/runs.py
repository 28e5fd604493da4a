"""Small runs of reinforcement learning: a tokenizer, prompts, rewards of tokens, and configurations."""

import json
import random
from pathlib import Path
from typing import Any

from flagscale_like.data.tokenizer import train_bpe
from tests.harness import tiny_config

VOCAB, NEW = 257, 10


def small_ids(answers):
    """The share of an answer's tokens that are below 64, less the repetitions: what a tiny policy learns in seconds."""
    return [sum(token < 64 for token in answer.ids) / max(1, len(answer.ids)) for answer in answers]


def shuffled(answers):
    """small_ids of another answer: nothing is to be learned from it."""
    scores = small_ids(answers)
    order = list(range(len(scores)))
    random.Random(str([list(answer.ids) for answer in answers])).shuffle(order)
    return [scores[number] for number in order]


def make_folder(folder: Path) -> Path:
    """tokenizer/ and prompts.jsonl."""
    train_bpe(["plain words for a plain tokenizer"], VOCAB, folder / "tokenizer")
    draw = random.Random(5)
    words = ["red", "green", "blue", "old", "new"]
    lines = [{"prompt": " ".join(draw.choices(words, k=draw.randint(1, 3))), "number": n} for n in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rl_config(run_dir: Path | str, folder: Path, rl: dict[str, Any] | None = None, **changes: Any):
    """A tiny run of task rl. `rl` overrides keys of the group, of `rollout` one by one."""
    rl = dict(rl or {})
    group = {
        "algorithm": "grpo",
        "reward": {"kind": "function", "function": "tests.rl.runs:small_ids"},
        "kl": {"coefficient": 0.02},
        "clip": {"value": 10.0},
        "critic": {"lr": 3e-3},
    }
    rollout = {"samples": 4, "max_new_tokens": NEW} | rl.pop("rollout", {})
    values = {
        "task": "rl",
        "rl": group | rl | {"rollout": rollout},
        "data": {"prompts": [str(folder / "prompts.jsonl")], "tokenizer": str(folder / "tokenizer")},
        "model__num_layers": 2,
        "model__vocab_size": VOCAB + 3,
        "train__global_batch_size": 32,
        "train__seq_length": 64,
        "train__steps": 3,
        "optimizer": {"lr": 3e-3, "schedule": "constant", "weight_decay": 0.0},
        "checkpoint__interval": 0,
    }
    return tiny_config(run_dir, **(values | changes))
