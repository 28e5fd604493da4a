"""Trains a model while killing random ranks, and compares the run with one that is not interrupted.

    python benchmarks/soak.py --steps 400 --kills 8 --out soak.json

The script prints the effective training time ratio (ETTR), recovery times, lost steps, and the growth of memory and file
descriptors of the ranks. It fails if any bit of a loss differs between both runs, or if a rank outlives the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from flagscale_like.json_files import read_records
from flagscale_like.run_folder import RunFolder
from flagscale_like.training.metrics import read_metrics
from flagscale_like.training.recovery import effective_time_ratio, read_ledger

SAMPLE_S = 0.25
STALLED_S = 180.0


def write_config(folder: Path, name: str, steps: int, interval: int) -> Path:
    """Write the YAML file of a small model with frequent checkpoints."""
    config = {
        "run_dir": str(folder / name),
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 96,
            "vocab_size": 250,
        },
        "train": {
            "steps": steps,
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "seq_length": 32,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-2, "warmup_steps": 1},
        "data": {"synthetic": True},
        "checkpoint": {"interval": interval, "keep": 2},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(config: Path, ranks: int, restarts: int) -> subprocess.Popen:
    command = ["-m", "flagscale_like", "train", str(config), "--nproc-per-node", str(ranks)]
    with open(config.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            [sys.executable, *command, "--max-restarts", str(restarts)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(launcher.pid).children():
        try:
            if "RANK" in child.environ():
                found.append(child)
        except psutil.Error:
            continue
    return found


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["lm loss"], r["grad-norm"]) for r in read_metrics(run_dir) if "lm loss" in r]


def last_step(run_dir: Path) -> tuple[int, float]:
    """The newest recorded step, and the Unix time at which it was recorded; (0, 0) before the first step."""
    path = run_dir / "metrics.jsonl"
    found = losses(run_dir)
    return (found[-1][0], path.stat().st_mtime) if found else (0, 0.0)


class Usage:
    """Samples of resident memory and file descriptors of each rank process, from its first new step on."""

    def __init__(self) -> None:
        self.samples: dict[int, list[tuple[float, int, int]]] = {}

    def sample(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            try:
                seen = (time.monotonic(), process.memory_info().rss, process.num_fds())
            except psutil.Error:
                continue
            self.samples.setdefault(process.pid, []).append(seen)

    def growth(self) -> dict[str, float]:
        """The growth from the second to the last quarter of the samples of the process that trained longest.

        The first quarter is left out, because buffers are still being allocated.
        """
        life = max(self.samples.values(), key=len)
        quarter = len(life) // 4
        early, late = life[quarter : 2 * quarter], life[-quarter:]
        memory = [statistics.median(s[1] for s in part) / 2**20 for part in (early, late)]
        files = [statistics.median(s[2] for s in part) for part in (early, late)]
        return {
            "observed_s": life[-1][0] - life[0][0],
            "memory_mib": memory[1],
            "memory_growth_mib": memory[1] - memory[0],
            "file_descriptors": files[1],
            "file_descriptor_growth": files[1] - files[0],
        }


def soak(folder: Path, *, steps: int, kills: int, ranks: int, interval: int, seed: int) -> dict:
    """Run both; the figures."""
    chance, usage, pids = random.Random(seed), Usage(), set()
    run_dir, quiet_dir = folder / "killed", folder / "undisturbed"
    config = write_config(folder, "killed", steps, interval)
    began = time.time()
    launcher = launch(config, ranks, kills)
    recoveries: list[float] = []
    # The next kill follows the last recovery after a random number of steps.
    next_kill, killed_at, moved = chance.randint(1, 2 * steps // (kills + 1)), None, time.monotonic()
    seen = (0, 0.0)
    try:
        while launcher.poll() is None:
            time.sleep(SAMPLE_S if killed_at is None else 0.02)
            now = last_step(run_dir)
            if now != seen:
                seen, moved = now, time.monotonic()
            assert time.monotonic() - moved < STALLED_S, f"no progress for {STALLED_S:.0f} s: see {folder}/killed.log"
            processes = ranks_of(launcher)
            pids |= {process.pid for process in processes}
            if seen[0] and killed_at is None:
                usage.sample(processes)
            if killed_at is not None and restarted(run_dir) > len(recoveries):
                recoveries.append(time.time() - killed_at)
                print(f"kill {len(recoveries)}: {recoveries[-1]:.1f} s to the first new step, {seen[0]}", flush=True)
                killed_at = None
                next_kill = seen[0] + chance.randint(1, max(1, 2 * (steps - seen[0]) // (kills - len(recoveries) + 1)))
            if killed_at is None and len(recoveries) < kills and seen[0] >= next_kill and len(processes) == ranks:
                killed_at = time.time()
                chance.choice(processes).kill()
        assert launcher.returncode == 0, f"exit code {launcher.returncode}: see {folder}/killed.log"
        wall = time.time() - began
    finally:
        for process in [*ranks_of(launcher), launcher] if launcher.poll() is None else []:
            process.kill()
    left = [pid for pid in pids if psutil.pid_exists(pid)]
    assert not left, f"processes {left} outlived the launcher"

    quiet = launch(write_config(folder, "undisturbed", steps, interval), ranks, 0)
    assert quiet.wait() == 0, f"see {folder}/undisturbed.log"
    assert losses(run_dir) == losses(quiet_dir), "the losses differ from those of the run that was never stopped"
    starts = [event for event in read_records(RunFolder(run_dir).resilience) if event["event"] == "start"]
    return {
        "steps": steps,
        "ranks": ranks,
        "save interval": interval,
        "kills": len(recoveries),
        "wall_s": wall,
        "ettr": ettr(run_dir),
        "recovery_s": recoveries,
        "lost steps": [event["lost_steps"] for event in starts[1:]],
        **usage.growth(),
    }


def ettr(run_dir: Path) -> float:
    """The run's effective time ratio."""
    return effective_time_ratio(read_metrics(run_dir), read_ledger(run_dir), time.time())


def restarted(run_dir: Path) -> int:
    """The number of restarts after which a step was done. A restart may remove records of earlier ones, but has the count."""
    return int(max((r["resilience/restarts"] for r in read_metrics(run_dir) if "resilience/restarts" in r), default=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--interval", type=int, default=10, help="steps between saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    figures = soak(
        folder,
        steps=options.steps,
        kills=options.kills,
        ranks=options.ranks,
        interval=options.interval,
        seed=options.seed,
    )
    shutil.rmtree(folder)  # after a failed assertion the folder stays, with both logs
    times, lost = figures["recovery_s"], figures["lost steps"]
    print(
        f"{figures['kills']} kills in {figures['steps']} steps on {figures['ranks']} ranks, {figures['wall_s']:.0f} s"
    )
    print("all losses have the same bits as those of the uninterrupted run")
    print(f"ETTR                {figures['ettr']:.1%}")
    if times:
        print(f"recovery            median {statistics.median(times):.1f} s, longest {max(times):.1f} s")
    if lost:
        print(f"lost steps          median {statistics.median(lost):.0f}, most {max(lost):.0f}")
    print(
        f"memory              {figures['memory_mib']:.0f} MiB per rank, grew by {figures['memory_growth_mib']:.1f} MiB "
        f"in {figures['observed_s']:.0f} s"
    )
    print(f"file descriptors    {figures['file_descriptors']:.0f}, grew by {figures['file_descriptor_growth']:.0f}")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
