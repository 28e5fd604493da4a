"""Times what a restart does with metrics.jsonl of a long run: find the last step, cut the file back, and add up its time.

    python benchmarks/long_record.py --folder /path/on/the/disk

The script writes a million steps with 28 numbers each, as if a kill had come 100 steps after the last checkpoint. It calls
only what earlier versions have, so that they can be measured with PYTHONPATH set to their source.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from flagscale_like.json_files import keep_records
from flagscale_like.training.recovery import Ledger

STEPS, SAVED = 1_000_000, 999_900


def write(path: Path) -> None:
    """The records of the run."""
    numbers = {f"monitor/number-{i}": 0.123456789 + i for i in range(22)} | {"lm loss": 2.5, "grad-norm": 0.5}
    at = {"time": "1970-01-06T18:53:20+00:00"}
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, STEPS + 1):
            record = {"step": step, "iteration-time": 0.5, "kept-time": step * 0.5, **numbers, **at}
            file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the file is written; it is removed at the end")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        path = Path(folder) / "metrics.jsonl"
        write(path)
        (path.parent / "resilience.jsonl").write_text('{"event": "start", "time": 0, "step": 0}\n', encoding="utf-8")
        size, clock = path.stat().st_size, [time.perf_counter()]
        ledger = Ledger(path.parent, SAVED, now=lambda: 600_000.0)
        clock.append(time.perf_counter())
        keep_records(path, "step", SAVED)
        clock.append(time.perf_counter())
        record = ledger.recovered()
        clock.append(time.perf_counter())
        found, cut, added = (after - before for before, after in zip(clock, clock[1:], strict=False))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        took = f"last step {found:.3f} s, cut {cut:.3f} s, after the first step {added:.3f} s"
        print(f"{size / 1e9:.2f} GB: {took}; peak memory {peak:.2f} GB")
        print(record)


if __name__ == "__main__":
    main()
