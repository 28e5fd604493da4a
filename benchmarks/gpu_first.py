"""The first minutes on a GPU: everything worth knowing, in the order of its worth, each stage under its own limit.

    python benchmarks/gpu_first.py --minutes 10 --out results
    python benchmarks/gpu_first.py --only kernels,losses

The stages are processes of their own. One that fails, hangs, dies or breaks the device costs its limit and no more. Each
leaves OUT/STAGE.log, and a line in OUT/stages.jsonl as it ends. The summary, one page, comes last: on the screen and in
OUT/summary.md. Exits with 1 if a stage did not end well. Without a GPU the stages run on the CPU where they can
(FLAGSCALE_LIKE_DEVICE=cpu), which tries the script and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = shlex.quote(sys.executable)
SHOWN_LINES = 18


@dataclass(frozen=True)
class Stage:
    """A process and its part of the time.

    Attributes:
        share: of the whole time that it may take at most, if what is left allows it.
        command: for bash, in the repository's root. OUT is the folder of the results, MINUTES the stage's limit.
        shown: what the summary shows of the output: lines that hold one of these words, those of the first word first; the
            last lines if none does.
    """

    name: str
    share: float
    command: str
    shown: tuple[str, ...] = ()


@dataclass
class Result:
    """How a stage ended. `outcome` is ok, failed (with its exit code), or out of time."""

    name: str
    outcome: str
    seconds: float
    limit_s: float
    shown: list[str]


BENCHMARK = f"{PYTHON} kernels/benchmarks/run.py --minutes $MINUTES --no-checks"  # the stage `kernels` has checked them


def _check(name: str, share: float) -> Stage:
    return Stage(name, share, f"{PYTHON} benchmarks/gpu_checks.py {name} $OUT/{name}", ("Error:", "BAD", "ok "))


STAGES = [
    Stage(
        "kernels",
        0.35,
        f"TRITON_INTERPRET=0 {PYTHON} -m pytest -q -m gpu -p no:cacheprovider --maxfail=60 --tb=line -n {{processes}} "
        "tests/kernels/test_gpu.py",
        (" passed", " failed", "FAILED", "ERROR", "Error:"),
    ),
    Stage("goals", 0.25, f"{BENCHMARK} --goals --out $OUT/goals", ()),
    _check("rl", 0.12),
    _check("losses", 0.3),
    _check("kill", 0.15),
    _check("offload", 0.1),
    Stage(
        "slice",
        0.15,
        f"{PYTHON} -m flagscale_like bench examples/slices/aquila2-7b.yaml --steps 10 --warmup 3 --save "
        "--nproc-per-node 1 --out $OUT/slice",
        ("Error:", "MFU", "as configured"),
    ),
    Stage("benchmarks", 0.6, f"{BENCHMARK} --out $OUT/kernels", ()),
]


def run(stage: Stage, limit_s: float, out: Path) -> Result:
    """Run a stage. What outlives its limit is killed, with all that it started."""
    log = out / f"{stage.name}.log"
    command = stage.command.replace("{processes}", str(max(1, min(10, (os.cpu_count() or 1) * 5 // 8))))
    environment = {
        **os.environ,
        "OUT": str(out),
        "MINUTES": f"{max(0.2, limit_s / 60 - 0.25):.2f}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            outcome = "ok" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
        finally:
            _kill(process)
    seconds = time.monotonic() - began
    return Result(stage.name, outcome, round(seconds, 1), round(limit_s, 1), shown_of(log, stage.shown))


def _kill(process: subprocess.Popen) -> None:
    """Kill the process group that a stage leaves."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def shown_of(log: Path, words: tuple[str, ...]) -> list[str]:
    """The lines of a log that the summary shows, each cut at 200 characters."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    found = dict.fromkeys(line for word in words for line in lines if word in line)
    return [line[:200] for line in (list(found)[:SHOWN_LINES] or lines[-SHOWN_LINES:])]


def run_all(stages: list[Stage], minutes: float, out: Path) -> list[Result]:
    """Run the stages in their order until the time is over; a stage that has no time left is reported as such."""
    out.mkdir(parents=True, exist_ok=True)
    ends, results = time.monotonic() + 60 * minutes, []
    with (out / "stages.jsonl").open("a", encoding="utf-8") as file:
        for stage in stages:
            limit_s = min(stage.share * 60 * minutes, ends - time.monotonic())
            if limit_s < 1:
                result = Result(stage.name, "not begun: no time left", 0.0, 0.0, [])
            else:
                print(f"{stage.name}: at most {limit_s:.0f} s", flush=True)
                result = run(stage, limit_s, out)
            results.append(result)
            print(f"{stage.name}: {result.outcome} after {result.seconds:.0f} s", flush=True)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
    return results


def machine() -> list[str]:
    """The device and the versions, one line each. Asks nvidia-smi, so that this process never touches the device."""
    lines = [f"date: {datetime.datetime.now(datetime.UTC).isoformat(timespec='minutes')}"]
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
    try:
        lines.append(f"device: {subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        lines.append(f"device: none ({type(error).__name__} from nvidia-smi)")
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "triton", "megatron-core", "transformers"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} is not installed")
    return [*lines, f"versions: {', '.join(versions)}"]


def summary(results: list[Result], header: list[str]) -> str:
    """One page: the machine, a line a stage, and what each showed."""
    rows = [f"| {r.name} | {r.outcome} | {r.seconds:.0f} s of {r.limit_s:.0f} |" for r in results]
    parts = ["# First minutes on a GPU", "", *header, "", "| stage | outcome | time |", "|---|---|---|", *rows]
    for result in results:
        parts += ["", f"## {result.name}", *(f"    {line}" for line in result.shown)]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="all stages together")
    parser.add_argument("--only", default="", help="comma-separated stages; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu_first"), help="folder of logs and results")
    args = parser.parse_args()
    known = [stage.name for stage in STAGES]
    wanted = [name for name in args.only.split(",") if name] or known
    if unknown := set(wanted) - set(known):
        parser.error(f"--only {', '.join(sorted(unknown))}: the stages are {', '.join(known)}")
    out = args.out.resolve()
    results = run_all([stage for stage in STAGES if stage.name in wanted], args.minutes, out)
    page = summary(results, machine())
    (out / "summary.md").write_text(page, encoding="utf-8")
    print(page)
    sys.exit(any(result.outcome != "ok" for result in results))


if __name__ == "__main__":
    main()
