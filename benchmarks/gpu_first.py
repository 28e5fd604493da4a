"""The first minutes on a GPU: everything worth knowing, in the order of its worth, each stage under its own limit.

    python benchmarks/gpu_first.py --minutes 10 --out results
    python benchmarks/gpu_first.py --only kernels,losses

The stages are processes of their own. One that fails, hangs, dies or breaks the device costs its limit and no more: its share
of the minutes, and what the stages before it have left of theirs. It is interrupted before the limit, so that it can say what
it has found, and killed at the limit.

OUT gets three files, which are written again as each stage ends: summary.md, one page; stages.jsonl, a line for each stage;
results.tar.gz, the logs and the small files that the stages have made. Checkpoints and other large files lie in a temporary
folder, which is deleted. The summary is printed last. Exits with 1 if a stage did not end well.

Without a GPU it is a rehearsal on the CPU, which measures nothing: the kernels' tests skip, the slice is a tiny model, and
the kernels' benchmark runs on a stand-in that fails at random places, so that the last stage ends as failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = shlex.quote(sys.executable)
GRACE_S = 8.0  # between the interruption of a stage and its end by force, where its limit is that long
# What comes back of a stage's files: those of these kinds and of at most this size.
KEPT_KINDS, KEPT_BYTES = (".log", ".json", ".jsonl", ".md", ".png", ".txt", ".yaml"), 4 << 20
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
)  # of the stages


@dataclass(frozen=True)
class Stage:
    """A process and its part of the time.

    Attributes:
        share: of the whole time that it may take. The shares of all stages make up 1.
        command: for bash, in the repository's root. WORK is the folder of the stage's files, MINUTES the stage's limit;
            {NAME} is one of `here`.
        shown: what the summary shows of the output: lines that hold one of these words, those of the first word first; the
            last lines if none does.
        lines: the most lines of output in the summary.
    """

    name: str
    share: float
    command: str
    shown: tuple[str, ...] = ()
    lines: int = 8


@dataclass
class Result:
    """How a stage ended. `outcome` is ok, failed (with its exit code), or out of time."""

    name: str
    outcome: str
    seconds: float
    limit_s: float
    shown: list[str]


# The stage `kernels` has checked them.
BENCHMARK = f"{PYTHON} kernels/benchmarks/run.py --minutes $MINUTES --no-checks {{stand_in}}"


def _check(name: str, share: float) -> Stage:
    return Stage(name, share, f"{PYTHON} benchmarks/gpu_checks.py {name} $WORK", ("Error:", "BAD", "ok "))


STAGES = [
    Stage(
        "kernels",
        0.35,
        # A line for each test as it ends: what is known when the time is over.
        f"TRITON_INTERPRET=0 {PYTHON} -m pytest -v -m gpu -p no:cacheprovider --maxfail=60 --tb=line --durations=0 "
        "--durations-min=20 {processes} tests/kernels/test_gpu.py",
        (" passed", " failed", "FAILED", "Error:", "ERROR", " skipped", "no tests ran"),
        lines=20,
    ),
    Stage("goals", 0.2, f"{BENCHMARK} --goals --out $WORK", (), lines=26),
    _check("rl", 0.08),
    _check("losses", 0.14),
    _check("kill", 0.05),
    _check("offload", 0.04),
    Stage(
        "slice",
        0.08,
        f"{PYTHON} -m flagscale_like bench {{slice}} --steps 10 --warmup 3 --save --nproc-per-node 1 --out $WORK",
        ("Error:", "MFU", "as configured"),
    ),
    Stage("benchmarks", 0.06, f"{BENCHMARK} --rest --out $WORK", (), lines=16),
]


def has_gpu() -> bool:
    """Whether the driver names a GPU. This process does not touch it."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def here() -> dict[str, str]:
    """What the commands depend on here.

    The processes of the kernels' tests, most of whose time goes to compiling; the benchmark's device; the slice's model.
    """
    processes = max(1, min(10, (os.cpu_count() or 1) * 5 // 8))
    gpu = has_gpu()
    return {
        "processes": f"-n {processes}" if importlib.util.find_spec("xdist") else "",
        "stand_in": "" if gpu else "--stand-in 0 --hang-seconds 5",
        "slice": "examples/slices/aquila2-7b.yaml" if gpu else "examples/aquila2/tiny.yaml",
    }


def run(stage: Stage, limit_s: float, work: Path) -> Result:
    """Run a stage. What outlives its limit is killed, with all that it started. Its log and its files are in `work`."""
    files, log = work / stage.name, work / f"{stage.name}.log"
    files.mkdir()
    environment = {
        **os.environ,
        "WORK": str(files),
        "MINUTES": f"{max(0.2, (limit_s - GRACE_S) / 60 - 0.1):.2f}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", stage.command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        outcome = _outcome(process, limit_s)
    seconds = time.monotonic() - began
    shown = [
        line.replace(f"{work}/", "") for line in shown_of(log, stage.shown, stage.lines)
    ]  # paths in results.tar.gz
    return Result(stage.name, outcome, round(seconds, 1), round(limit_s, 1), shown)


def _outcome(process: subprocess.Popen, limit_s: float) -> str:
    grace = GRACE_S if limit_s > 3 * GRACE_S else 0.0
    try:
        code = process.wait(limit_s - grace)
        return "ok" if code == 0 else f"failed, exit code {code}"
    except subprocess.TimeoutExpired:
        if grace:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        return "out of time"
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Kill the process group that a stage leaves."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def shown_of(log: Path, words: tuple[str, ...], count: int) -> list[str]:
    """The lines of a log that the summary shows, each cut at 140 characters."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    found = dict.fromkeys(line for word in words for line in lines if word in line)
    return [line[:140] for line in (list(found)[:count] or lines[-count:])]


def keep(work: Path, out: Path) -> None:
    """Write OUT/results.tar.gz: what the stages have left, without checkpoints and other large files."""
    scratch = out / "results.part"
    with tarfile.open(scratch, "w:gz") as archive:
        for path in sorted(work.rglob("*")):
            if path.is_file() and path.suffix in KEPT_KINDS and path.stat().st_size <= KEPT_BYTES:
                archive.add(path, path.relative_to(work))
    scratch.replace(out / "results.tar.gz")


def run_all(stages: list[Stage], minutes: float, out: Path, header: list[str]) -> list[Result]:
    """Run the stages in their order until the time is over; a stage that has no time left is reported as such.

    Whatever ends this process, OUT has what was known when the last stage ended.
    """
    out.mkdir(parents=True, exist_ok=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; stages would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    began, given, results = time.monotonic(), 0.0, []
    with (
        (out / "stages.jsonl").open("a", encoding="utf-8") as file,
        tempfile.TemporaryDirectory(prefix="gpu-first-", ignore_cleanup_errors=True) as work,
    ):
        for i, stage in enumerate(stages):
            share, spent = stage.share * 60 * minutes, time.monotonic() - began
            given += share
            limit_s = min(max(share, given - spent), 60 * minutes - spent)
            if limit_s < 1:
                result = Result(stage.name, "not begun: no time left", 0.0, 0.0, [])
            else:
                print(f"{stage.name}: at most {limit_s:.0f} s", flush=True)
                result = run(stage, limit_s, Path(work))
            results.append(result)
            print(f"{stage.name}: {result.outcome} after {result.seconds:.0f} s", flush=True)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            waiting = [Result(s.name, "not begun yet", 0.0, 0.0, []) for s in stages[i + 1 :]]
            (out / "summary.md").write_text(summary([*results, *waiting], header), encoding="utf-8")
            keep(Path(work), out)
    return results


def machine() -> list[str]:
    """The device and the versions, one line each. Asks nvidia-smi, so that this process never touches the device."""
    lines = [f"date: {datetime.datetime.now(datetime.UTC).isoformat(timespec='minutes')}"]
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
    try:
        lines.append(f"device: {subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        lines.append(f"device: none ({type(error).__name__} from nvidia-smi)")
    versions, lacking = [f"python {platform.python_version()}"], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lacking.append(package)
    lines.append(f"versions: {', '.join(versions)}")
    if lacking:
        lines.append(f"NOT INSTALLED, so stages that need them fail: {', '.join(lacking)}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [*lines, f"commit: {commit.stdout.strip() or 'unknown'}"]


def summary(results: list[Result], header: list[str]) -> str:
    """One page: the machine, a line a stage, and what each showed."""
    rows = [f"| {r.name} | {r.outcome} | {r.seconds:.0f} s of {r.limit_s:.0f} |" for r in results]
    parts = ["# First minutes on a GPU", "", *header, "", "| stage | outcome | time |", "|---|---|---|", *rows]
    for result in (r for r in results if r.shown):
        parts += ["", f"## {result.name}", *(f"    {line}" for line in result.shown)]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="all stages together")
    parser.add_argument("--only", default="", help="comma-separated stages; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu_first"), help="folder of the summary and the results")
    args = parser.parse_args()
    known = [stage.name for stage in STAGES]
    wanted = [name for name in args.only.split(",") if name] or known
    if unknown := set(wanted) - set(known):
        parser.error(f"--only {', '.join(sorted(unknown))}: the stages are {', '.join(known)}")
    header = machine()
    print("\n".join(header), flush=True)
    stages = [stage for stage in STAGES if stage.name in wanted]
    whole = sum(stage.share for stage in stages)  # the stages that are asked for share all of the time
    found = here()
    stages = [replace(stage, share=stage.share / whole, command=stage.command.format(**found)) for stage in stages]
    results = run_all(stages, args.minutes, args.out.resolve(), header)
    print(summary(results, header))
    sys.exit(any(result.outcome != "ok" for result in results))


if __name__ == "__main__":
    main()
