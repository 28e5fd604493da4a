"""A tiny embedding model for four retrieval tasks: write the data, train, and ask for passages before and after.

The script prints each command that it runs. From new weights, on a laptop:

    python examples/embed/run.py [--run-dir runs/embed] [--ranks 1]
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.insert(0, str(HERE))

from tasks import TASKS, write_task  # noqa: E402


def run(*arguments: str) -> str:
    """Print and run `flagscale-like ARGUMENTS`; returns what it printed. If it fails, exit with its exit code."""
    print(f"\n$ flagscale-like {shlex.join(arguments)}", flush=True)
    found = subprocess.run([sys.executable, "-m", "flagscale_like", *arguments], stdout=subprocess.PIPE, text=True)
    print(found.stdout, end="", flush=True)
    if found.returncode:
        sys.exit(found.returncode)
    return found.stdout


def main(arguments: Sequence[str] | None = None, run: Callable[..., str] = run) -> dict[str, tuple[float, float]]:
    """Run the example.

    Args:
        arguments: command line; None takes sys.argv.
        run: runs a flagscale-like command with the given arguments, and returns what it printed.

    Returns:
        recall@1 of each task before and after training.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/embed"), help="an existing one is removed first")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="a source of data each")
    args = parser.parse_args(arguments)
    tasks = {name: TASKS[name] for name in args.tasks}
    began, data = time.perf_counter(), args.run_dir / "data"
    shutil.rmtree(args.run_dir, ignore_errors=True)
    for name, task in tasks.items():
        write_task(data / name, task)
    files = [str(data / name / "train.jsonl") for name in tasks]
    text = data / "text.txt"  # what the tokenizer learns from: it gives each word and each instruction few tokens
    text.write_text("\n".join(line for task in tasks.values() for line in task.texts()), encoding="utf-8")
    run("preprocess", str(text), "--unit", "line", "--train-tokenizer", "700", "--out", str(data / "text"))
    for (name, task), file in zip(tasks.items(), files, strict=True):
        instructions = [
            "--query-instruction",
            task.query_instruction,
            "--passage-instruction",
            task.passage_instruction,
        ]
        run(
            "data",
            "groups",
            file,
            "--tokenizer",
            str(data / "text-tokenizer"),
            "--out",
            str(data / name),
            *instructions,
        )
    common = ["train", str(HERE / "tiny.yaml"), f"data.tokenizer={data / 'text-tokenizer'}"]
    common += [f"data.sources=[{', '.join(f'{{path: {data / name}}}' for name in tasks)}]"]
    common += ["--nproc-per-node", str(args.ranks)] if args.ranks > 1 else []
    new = args.run_dir / "new"
    run(*common, f"run_dir={new}", "train.steps=1", "optimizer.warmup_steps=0", "optimizer.lr=1e-12")
    run(*common, f"run_dir={args.run_dir}", f"train.steps={args.steps}", f"checkpoint.interval={args.steps}")
    before, after = (_recalls(run, model, data, args.tasks) for model in (new, args.run_dir))
    print(f"\n{'task':<12}{'recall@1 of new weights':>26}{'trained':>10}")
    for name in tasks:
        print(f"{name:<12}{before[name]:>26.3f}{after[name]:>10.3f}")
    print(f"whole example: {time.perf_counter() - began:.0f} s")
    return {name: (before[name], after[name]) for name in tasks}


def _recalls(run: Callable[..., str], model: Path, data: Path, tasks: Sequence[str]) -> dict[str, float]:
    """recall@1 of a model on the queries of each task that were held out."""
    folders = [word for name in tasks for word in ("--retrieval", str(data / name))]
    printed = run("evaluate", "--checkpoint", str(model), *folders)
    return {name: float(re.findall(rf"{name}: recall@1 ([\d.]+)", printed)[0]) for name in tasks}


if __name__ == "__main__":
    main()
