"""Check and measure every kernel on this machine's CUDA device, next to other implementations and to the card itself.

    python kernels/benchmarks/run.py --minutes 8       what fits into eight minutes, in the order of its worth
    python kernels/benchmarks/run.py                   all rows
    python kernels/benchmarks/run.py --only rms,flash  operators whose name contains one of these
    python kernels/benchmarks/run.py --configs         every config of the attention kernels' lists; --wide: and others
    python kernels/benchmarks/run.py --smoke           run each operator once on the CPU at a tiny size; measures nothing
    python kernels/benchmarks/run.py --stand-in 1      a rehearsal on the CPU, with a device that fails at random places

The order: the numbers of every variant against PyTorch in float64, in several processes at a time; the card's copy bandwidth
and matrix rate; our kernels at the shapes that have a goal; the other implementations there (those that are installed);
other shapes. Each row is written as it comes, to DIR/NAME.jsonl, and all of them to DIR/NAME.json at the end, with a plot. A
row that raises becomes a failure. A row that loses the device, ends its process or hangs does too: a fresh process takes the
others.

Times are medians of the device's time, with a cold L2 cache and with all of a call launched before the device begins it;
"host_milliseconds" is the time that the host needs to launch a call. For memory-bound operators it reports GB/s of the
least traffic that the operator needs, and the share of the card's measured copy bandwidth. For attention and the fused output
layer it reports TFLOP/s of the products that the mask does not remove, and the share of the card's measured matrix rate.
Without a CUDA device it prints so and exits with 0; where a row of our own kernels failed it exits with 1.
"""

import argparse
import datetime
import os
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import peers  # noqa: E402
import plan  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
from report import Report  # noqa: E402
from supervisor import Supervisor  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
WRAP_UP_SECONDS = 10  # of the minutes given, for the plots and the summary


def smoke(parts):
    """Run every workload once on the CPU with every installed provider."""
    for workload in workloads.workloads("cpu", tiny=True):
        if parts and not any(part in workload.operator for part in parts):
            continue
        for name, provider in peers.providers(workload).items():
            for call in plan.passes(workload, provider).values():
                call()
            print(f"{workload.operator} {workload.shape}: {name} ran")


def supervised(rows, jobs, order, until, emit):
    """Compute `rows` in `jobs` processes at a time. Returns the keys of those that the time did not reach."""
    keys, limits = [row.key for row in rows], {row.key: row.seconds for row in rows}
    supervisors = [Supervisor(keys[i::jobs], limits, order, until, emit) for i in range(min(jobs, len(keys)))]
    for i, supervisor in enumerate(supervisors):
        if order["seed"] is not None:  # each process of a rehearsal fails elsewhere
            supervisor.order = order | {"seed": order["seed"] + 1000 * i}
    threads = [threading.Thread(target=supervisor.run) for supervisor in supervisors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [key for supervisor in supervisors for key in supervisor.keys]


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so many minutes")
    parser.add_argument("--only", default="", help="comma-separated parts of operators' names")
    parser.add_argument("--configs", action="store_true", help="time every config of the attention kernels' lists")
    parser.add_argument("--wide", action="store_true", help="with --configs: time configs that are not listed, too")
    parser.add_argument("--no-checks", action="store_true", help="measure without checking the numbers before")
    parser.add_argument("--goals", action="store_true", help="measure only our kernels where there is a goal")
    parser.add_argument("--rest", action="store_true", help="measure only what --goals leaves out")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that check at a time")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="by default kernels/benchmarks/results"
    )
    parser.add_argument("--smoke", action="store_true", help="run each operator once on the CPU; measure nothing")
    parser.add_argument("--stand-in", type=int, metavar="SEED", help="rehearse on a CPU that fails at random places")
    parser.add_argument("--hang-seconds", type=float, default=3600.0, help=argparse.SUPPRESS)
    parser.add_argument("--row-seconds", type=float, default=float("inf"), help="end a row that takes longer")
    return parser.parse_args()


def main():
    args = options()
    started = time.time()
    parts = [part for part in args.only.split(",") if part]
    if args.smoke:
        smoke(parts)
        return 0
    rehearsal = args.stand_in is not None
    if not rehearsal and not torch.cuda.is_available():
        print("no CUDA device")
        return 0
    now = datetime.datetime.now(datetime.UTC)
    device = "stand-in" if rehearsal else torch.cuda.get_device_name()
    report = Report(args.out / f"{device.replace(' ', '_')}-{now:%Y%m%d-%H%M%S}", peers.OURS, judge=not args.rest)
    until = started + args.minutes * 60 - WRAP_UP_SECONDS * (args.minutes > 1)
    order = {"seed": args.stand_in, "hang_seconds": args.hang_seconds, "parts": parts, "configs": args.configs,
             "wide": args.wide}  # fmt: skip
    where = ("cpu" if rehearsal else "cuda", rehearsal, parts)
    left = []
    if args.configs:
        stages = [(1, plan.configs(*where, args.wide))]
    else:
        checks = [] if args.no_checks else plan.checks(*where[1:])
        timings = [row for row in plan.timings(*where) if row.for_goals or not args.goals]
        if args.rest:
            timings = [row for row in timings if not row.for_goals or row.key == "card"]
        if peers.lacking() and not args.goals:
            report.add({"kind": "note", "text": f"not installed, so not timed: {', '.join(peers.lacking())}"})
        stages = [(args.jobs, checks), (1, timings)]
    for jobs, rows in stages:
        limited = [plan.replace(row, seconds=min(row.seconds, args.row_seconds)) for row in rows]
        left += supervised(limited, jobs, order, until, report.add)
    about = {"device": device, "date": now.isoformat(timespec="seconds"), "command": sys.argv[1:]}
    print(report.finish(about, left))
    print(report.path.with_suffix(".json"))
    return int(report.has_failure_of_ours())


if __name__ == "__main__":
    sys.exit(main())
