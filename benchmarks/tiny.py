"""Runs of a tiny model for experiments. It trains in a minute on one core, on the source of Python's standard library."""

from __future__ import annotations

import contextlib
import io
import sysconfig
from pathlib import Path
from typing import Any

from flagscale_like.config import RunConfig
from flagscale_like.data.pretrain import prepare_once
from flagscale_like.errors import DivergedError
from flagscale_like.json_files import read_records
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.metrics import read_metrics

VOCABULARY = 512
# About 1.5 MB of code by many authors.
PACKAGES = ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging", "unittest")


def stdlib_patterns(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Globs of the source files of some packages of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return [str(root / package / "*.py") for package in packages]


def tiny_run(run_dir: Path, *, layers: int, hidden: int, steps: int, lr: float, **groups: Any) -> RunConfig:
    """Make the configuration of a tiny run. `groups` adds keys to its groups or replaces them; `data` replaces the group."""
    values: dict[str, Any] = {
        "model": {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": hidden // 16,
            "ffn_hidden_size": hidden * 11 // 4 // 16 * 16,
            "vocab_size": VOCABULARY,
        },
        "train": {
            "steps": steps,
            "micro_batch_size": 8,
            "global_batch_size": 8,
            "seq_length": 64,
            "precision": "fp32",
        },
        "optimizer": {"lr": lr, "warmup_steps": min(20, steps - 1)},
        "data": {"prepare": {"input": stdlib_patterns(), "tokenizer_vocab_size": VOCABULARY}},
        "checkpoint": {"interval": 0},
    }
    for name, group in groups.items():
        values[name] = {**values.get(name, {}), **group} if name != "data" else group
    return RunConfig.model_validate({"run_dir": str(run_dir), **values})


def prepared(folder: Path) -> dict[str, Any]:
    """Tokenize the corpus to a folder, and return the configuration group `data` that reads it."""
    config = prepare_once(tiny_run(folder, layers=1, hidden=16, steps=2, lr=1e-3))
    return config.data.model_dump(exclude_defaults=True)


def run(config: RunConfig) -> tuple[list[dict], list[dict], str | None]:
    """Train in this process without output.

    Returns:
        The records of metrics.jsonl, the records of events.jsonl, and the message of a DivergedError that stopped the run.
    """
    stopped = None
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            with parallel_context(config.parallel) as ctx:
                pretrain(config, ctx)
        except DivergedError as error:
            stopped = str(error)
    run_dir = Path(config.run_dir)
    return read_metrics(run_dir), read_records(run_dir / "events.jsonl"), stopped


def losses_of(records: list[dict]) -> list[tuple[int, float]]:
    """(step, training loss) of each recorded step. A non-finite loss is infinity."""
    return [(r["step"], r["lm loss"] if r["lm loss"] is not None else float("inf")) for r in records if "lm loss" in r]
