"""Compile every kernel, variant and config for sm_80 and sm_90 with another Triton than the installed one.

    pip install --target FOLDER --no-deps triton==3.6.0
    python kernels/benchmarks/other_triton.py FOLDER [--only PARTS] [--arch 90]

What has compiled is kept in FOLDER/flagscale_kernels.json, case by case, under keys like those of known_resources.json: a run
that is ended goes on where it was, and a run after a change compiles what has changed. Installs nothing. The folder is the
argument, or what FLAGSCALE_KERNELS_OTHER_TRITON names; without either it says so and ends with 0, which is what `make soak`
does on a machine that has no other Triton. Prints a line for each case; exits with 1 if a kernel does not compile or does not
fit into the chip's shared memory.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "FLAGSCALE_KERNELS_OTHER_TRITON"
HERE = Path(__file__).resolve().parent
RESULTS = "flagscale_kernels.json"


def keep(path: Path, known: dict) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(known), encoding="utf-8")
    scratch.replace(path)


def compile_all(only: str, archs: list[int], results: Path) -> int:
    """Compile the cases with the Triton that is imported here. Returns the number of cases that do not compile or fit."""
    import resources  # after the choice of the Triton
    import triton

    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    bad, compiled, kept = 0, 0, len(known)
    for arch in archs:
        for label, case in resources.cases(False):
            if only and not any(part in label for part in only.split(",")):
                continue
            try:
                rows = resources.compile_case(label, case, arch, known)
            except Exception as error:  # a compiler's errors have many classes
                last = [line for line in str(error).splitlines() if line.strip()][-1:] or [""]
                print(f"BAD  sm_{arch} {label}: {type(error).__name__}: {last[0][:200]}", flush=True)
                bad += 1
                continue
            new, kept = len(known) - kept, len(known)
            if new:
                keep(results, known)
            fat = [row["kernel"] for row in rows if not row["fits"]]
            spilling = sum(any(loop["local"] for loop in row["loops"]) for row in rows)
            bad += bool(fat)
            compiled += len(rows)
            said = f"{len(rows)} kernels, {new} compiled now, {spilling} with spills in a loop"
            said += f", too large for shared memory: {fat}" if fat else ""
            print(f"{'BAD ' if fat else 'ok  '} sm_{arch} {label}: {said}", flush=True)
    print(f"Triton {triton.__version__} of {Path(triton.__file__).parents[1]}: {compiled} kernels, {bad} cases failed")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=os.environ.get(VARIABLE, ""), help="that holds a package triton")
    parser.add_argument("--only", default="", help="comma-separated parts of the labels of cases")
    parser.add_argument("--arch", type=int, choices=(80, 90), help="default: both")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    archs = [args.arch] if args.arch else [80, 90]
    if args.here:
        sys.path[:0] = [str(HERE), str(HERE.parent)]
        return int(compile_all(args.only, archs, Path(args.folder) / RESULTS) > 0)
    if not args.folder:
        print(f"compiled nothing: neither an argument nor {VARIABLE} names a folder with another Triton")
        return 0
    folder = Path(args.folder).resolve()
    if not (folder / "triton" / "__init__.py").exists():
        print(f"error: {folder} has no package triton: pip install --target {folder} --no-deps triton==3.6.0")
        return 2
    # PYTHONPATH comes before the installed packages, of which torch is one.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(HERE), str(HERE.parent)])
    command = [
        sys.executable,
        __file__,
        str(folder),
        "--here",
        "--only",
        args.only,
        *(["--arch", str(args.arch)] if args.arch else []),
    ]
    return subprocess.run(command, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
