"""Measures the cost of the monitors: the time inside them, as a share of the step time of the same run.

    python -m benchmarks.monitors --out monitors.json

The script runs one training with all monitors on, and times each call of a monitor, with the device synchronized. The
result therefore does not depend on a comparison of two runs on a busy machine. Layers and effective rank are measured
every few steps; the printed share is that of their default interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from flagscale_like.config import EffectiveRank, RunConfig
from flagscale_like.recipes import pretrain as recipe
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.monitors import StepMonitors


class TimedMonitors(StepMonitors):
    """Records the seconds of each step's monitoring, and the time at which it ended."""

    seconds: list[float]
    ended: list[float]

    def __init__(self, options, engine) -> None:
        super().__init__(options, engine)
        self.platform = engine.ctx.platform
        TimedMonitors.seconds, TimedMonitors.ended = [], []

    def before(self, plan) -> None:
        TimedMonitors.seconds.append(0.0)
        self._timed(super().before, plan)

    def judge(self, facts) -> list:
        return self._timed(super().judge, facts)

    def after(self, step, report) -> None:
        self._timed(super().after, step, report)
        TimedMonitors.ended.append(time.perf_counter())

    def _timed(self, function, *arguments):
        self.platform.synchronize()
        began = time.perf_counter()
        result = function(*arguments)
        self.platform.synchronize()
        TimedMonitors.seconds[-1] += time.perf_counter() - began
        return result


def configuration(run_dir: str, options: argparse.Namespace) -> RunConfig:
    """The configuration of a run on synthetic tokens with all monitors on."""
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "model": {
                "num_layers": options.layers,
                "hidden_size": options.hidden,
                "num_attention_heads": options.hidden // 64,
                "ffn_hidden_size": options.hidden * 11 // 4 // 64 * 64,
                "vocab_size": 8192,
            },
            "train": {
                "steps": options.steps,
                "micro_batch_size": options.micro_batch_size,
                "global_batch_size": options.global_batch_size,
                "seq_length": options.seq_length,
                "precision": options.precision,
                "log_interval": 50,
            },
            "optimizer": {"lr": 3e-4, "warmup_steps": min(10, options.steps - 1)},
            "data": {"synthetic": True},
            "checkpoint": {"interval": 0},
            "monitors": {name: {"interval": options.measure_every} for name in ("layers", "effective_rank")},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("steps", 14),
        ("measure-every", 4),
        ("layers", 8),
        ("hidden", 512),
        ("seq-length", 256),
        ("micro-batch-size", 1),
        ("global-batch-size", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    vars(recipe)["StepMonitors"] = TimedMonitors
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(f"{folder}/run", options)
        with parallel_context(config.parallel) as ctx:
            device = ctx.platform.describe()
            recipe.pretrain(config, ctx)
    interval = EffectiveRank().interval
    ended, seconds = TimedMonitors.ended, TimedMonitors.seconds
    steps = [later - earlier - cost for earlier, later, cost in zip(ended, ended[1:], seconds[1:], strict=False)]
    step_s = statistics.median(steps)
    measured = [cost for step, cost in enumerate(seconds, 1) if step % options.measure_every == 0]
    other = [cost for step, cost in enumerate(seconds, 1) if step % options.measure_every]
    cost_s = statistics.fmean(measured)
    share = (cost_s + statistics.fmean(other) * (interval - 1)) / (interval * step_s)
    result = {
        "device": device,
        "parameters": config.model.parameter_count(),
        "hidden": options.hidden,
        "precision": options.precision,
        "step_s": step_s,
        "interval": interval,
        "measuring_s": cost_s,
        "every_step_s": statistics.fmean(other),
        "share_of_step_time": share,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
