"""Compile the kernels for sm_80 and sm_90 without a GPU, and print the registers, stack and memory that each needs.

    python kernels/benchmarks/resources.py             every kernel, variant and config: the table in docs/kernels.md
    python kernels/benchmarks/resources.py --quick     one variant of each kernel, with its default config
    python kernels/benchmarks/resources.py --write     also writes known_resources.json, for the tests
    python kernels/benchmarks/resources.py --again     compiles what the file has, too, and names the rows that differ
    python kernels/benchmarks/resources.py --json      JSON instead of a table

The default config is the one that runs without autotuning; an asterisk marks it in the table. Triton keeps what it
compiled, by source and config, in its cache folder (TRITON_CACHE_DIR): a second run compiles what has changed.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the kernels' tests set it
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import offline  # noqa: E402
import torch  # noqa: E402
import variant  # noqa: E402

import flagscale_kernels  # noqa: E402, F401  (loads the modules below)
from flagscale_kernels import _attention_launch as launch  # noqa: E402
from flagscale_kernels._rivals import ALWAYS, RIVALS_VARIABLE  # noqa: E402
from flagscale_kernels._tuning import AUTOTUNE_VARIABLE, run_every_config  # noqa: E402

NAMES = (
    "rms_norm",
    "layer_norm",
    "rope",
    "_gated",
    "token_permutation",
    "cross_entropy",
    "flash_attention",
    "piecewise_attention",
)
MODULES = {name: sys.modules[f"flagscale_kernels.{name}"] for name in NAMES}
KNOWN = Path(__file__).resolve().with_name("known_resources.json")
COLUMNS = ("warps", "stages", "edge", "registers", "stack", "shared", "blocks_per_sm", "HGMMA", "HMMA")
DQ_SUMS = ("", "added", "ordered")  # ways of a backward: how the kernel of dK and dV adds dQ up
GIVES = {0: "", 1: "dQ added", 2: "dQ ordered", -1: "dK alone", -2: "dV alone"}  # that kernel's constant SUM
S, B, H, F, V = 4096, 1, 4096, 11008, 32000


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm(dtype, quick=False):
    module = MODULES["rms_norm"]
    for h in (H,) if quick else (128, H, 8192, 12288, 16384, 32768, 65536):
        x, w, rstd = meta(S, B, h, dtype=dtype), meta(h, dtype=dtype), meta(S, B, dtype=torch.float32)
        for residual in (x,) if quick else (None, x):
            module._forward_triton(x, residual, w, 1e-6, True)
            module._backward_triton(x, x, w, rstd, True, residual)


def layer_norm(dtype, quick=False):
    module = MODULES["layer_norm"]
    for h in (16384,) if quick else (128, H, 8192, 12288, 16384, 32768, 65536):
        x, w, statistics = meta(S, B, h, dtype=dtype), meta(h, dtype=dtype), meta(S, B, dtype=torch.float32)
        module._forward_triton(x, w, w, 1e-5)
        module._backward_triton(x, x, w, statistics, statistics, True)


def rope(dtype, quick=False):
    q, k, cos = meta(S, B, 32, 128, dtype=dtype), meta(S, B, 8, 128, dtype=dtype), meta(S, 64, dtype=torch.float32)
    positions = meta(B, S, dtype=torch.int64)
    for interleaved in (False, True):
        for ids in (None,) if quick else (None, positions):
            MODULES["rope"]._rotate_triton(q, k, q, k, cos, cos, ids, "sbnd", interleaved, 1.0)
    if quick:
        return
    half = meta(S, 32, dtype=torch.float32)
    MODULES["rope"]._rotate_triton(q, None, meta(*q.shape, dtype=dtype), None, half, half, None, "sbnd", False, -1.0)


def gated(dtype, quick=False):
    gate, weight = meta(S, B, F, dtype=dtype), meta(S, B, dtype=torch.float32)
    of_gate, of_up = meta(S, B, F, dtype=dtype), meta(S, B, F, dtype=dtype)
    for activation in ("silu",) if quick else MODULES["_gated"].ACTIVATIONS:
        for w in (weight,) if quick else (None, weight):
            MODULES["_gated"]._forward_triton(gate, gate, w, activation)
            MODULES["_gated"]._backward_triton(gate, gate, gate, w, of_gate, of_up, activation)


def token_permutation(dtype, quick=False):
    for k in (8,) if quick else (1, 2, 8):
        inverse = meta(S, k, dtype=torch.int64)
        MODULES["token_permutation"]._sum_rows_triton(meta(S * k, H, dtype=dtype), inverse)
        MODULES["token_permutation"]._copy_rows_triton(meta(S, H, dtype=dtype), inverse)


def cross_entropy(dtype, quick=False):
    module = MODULES["cross_entropy"]
    logits, target, per_token = meta(S, V, dtype=dtype), meta(S, dtype=torch.int64), meta(S, dtype=torch.float32)
    for with_sum in (True,) if quick else (False, True):
        module._statistics_triton(logits, target, 0, with_sum)
    module._gradient_triton(logits, target, per_token, per_token, logits, 0, V, 0.1, 1e-4)


def run_attention(problem, kernels, ways):
    """Launch the kernels of a forward and of backwards: "" with seven products, and with five as DQ_SUMS says."""
    o, lse = launch.forward(problem, kernels)
    for way in ways:
        ordered, deterministic = way == "ordered", way != "added"
        with variant.environment(launch.ORDERED_VARIABLE, str(int(ordered))):
            launch.backward(problem, kernels, o, None, o, lse, deterministic=deterministic)


def flash_attention(
    dtype, d, causal=True, alibi=False, window=-1, packed=False, v=None, cap=0.0, sinks=False, ordered=False
):  # fmt: skip
    shapes = [(32, d), (8, d), (8, v or d)]
    q, k, values = (meta(S, *(() if packed else (B,)), *shape, dtype=dtype) for shape in shapes)
    cu = meta(5, dtype=torch.int32) if packed else None
    per_head = meta(32, dtype=torch.float32)
    run_attention(
        launch.Problem(
            pairs=((q, k),), v=values, layout="tnd" if packed else "sbnd", max_q=S, max_k=S, scale=d**-0.5,
            left=window, right=0 if causal else -1, cap=cap, slopes=per_head if alibi else None,
            sinks=per_head if sinks else None, cu_q=cu, cu_k=cu,
        ),
        MODULES["flash_attention"].KERNELS,
        DQ_SUMS if ordered else DQ_SUMS[:2],
    )  # fmt: skip


def hopper_attention(dtype, d, causal=True):
    """The kernels in Gluon, which take these calls on sm_90 (`_rivals.py`)."""
    before = os.environ.pop(RIVALS_VARIABLE, None)
    os.environ[RIVALS_VARIABLE] = ALWAYS
    try:
        q, k = meta(S, B, 32, d, dtype=dtype), meta(S, B, 8, d, dtype=dtype)
        problem = launch.Problem(
            pairs=((q, k),), v=k, layout="sbnd", max_q=S, max_k=S, scale=d**-0.5, right=0 if causal else -1
        )
        run_attention(problem, MODULES["flash_attention"].KERNELS, DQ_SUMS[:1])
    finally:
        os.environ.pop(RIVALS_VARIABLE)
        if before is not None:
            os.environ[RIVALS_VARIABLE] = before


def piecewise_attention(dtype, d, causal=True, ordered=False):
    q, k = meta(S, B, 32, d, dtype=dtype), meta(S, B, 8, d, dtype=dtype)
    for threshold in (S // 2, S // 2 + 1, 1):  # compiled once: the threshold is not part of the code
        problem = launch.Problem(
            pairs=((q, k),) * 2, v=k, layout="sbnd", max_q=S, max_k=S, scale=d**-0.5, threshold=threshold,
            right=0 if causal else -1,
        )  # fmt: skip
        run_attention(problem, MODULES["piecewise_attention"].KERNELS, DQ_SUMS if ordered else DQ_SUMS[:2])


def cases(quick):
    """(label, function) of each case; the function launches the kernels of a forward and a backward."""
    bf16 = torch.bfloat16
    found = [
        (f.__name__, lambda f=f: f(bf16, quick))
        for f in (rms_norm, layer_norm, rope, gated, token_permutation, cross_entropy)
    ]
    found += [
        ("causal D128", lambda: flash_attention(bf16, 128, ordered=True)),
        ("D128", lambda: piecewise_attention(bf16, 128, ordered=True)),
    ]
    if quick:
        return found
    found += [
        (f"hopper {'causal' if causal else 'full'} D{d}", lambda d=d, causal=causal: hopper_attention(bf16, d, causal))
        for d in (64, 128)
        for causal in (True, False)
    ]
    fp16, fp32 = torch.float16, torch.float32
    return [
        *found,
        ("causal D64", lambda: flash_attention(bf16, 64, ordered=True)),
        ("full D128", lambda: flash_attention(bf16, 128, causal=False, ordered=True)),
        ("ALiBi D128", lambda: flash_attention(bf16, 128, alibi=True)),
        ("window D128", lambda: flash_attention(bf16, 128, window=1023)),
        ("packed D128", lambda: flash_attention(bf16, 128, packed=True, ordered=True)),
        ("causal D96", lambda: flash_attention(bf16, 96)),
        ("causal D192 V128", lambda: flash_attention(bf16, 192, v=128)),
        ("causal D192", lambda: flash_attention(bf16, 192)),
        ("causal D256", lambda: flash_attention(bf16, 256)),
        ("softcap and sinks D128", lambda: flash_attention(bf16, 128, cap=50.0, sinks=True)),
        ("causal D128 fp16", lambda: flash_attention(fp16, 128)),
        ("causal D128 fp32", lambda: flash_attention(fp32, 128)),
        ("D64", lambda: piecewise_attention(bf16, 64)),
        ("D192", lambda: piecewise_attention(bf16, 192)),
        ("D256", lambda: piecewise_attention(bf16, 256)),
        ("full D128", lambda: piecewise_attention(bf16, 128, causal=False)),
        *(
            (f"{f.__name__} fp32", lambda f=f: f(fp32))
            for f in (rms_norm, layer_norm, rope, gated, token_permutation, cross_entropy)
        ),
    ]


def configs_to_compile(quick):
    """A context in which each launch compiles its default config (quick) or all configs of its list."""
    if not quick:
        return run_every_config()
    os.environ[AUTOTUNE_VARIABLE] = "0"
    return contextlib.nullcontext()


def read_known():
    """{key: resources} of the kernels that have been compiled; `--write` writes it."""
    return json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}


def write_known(known):
    lines = [f"{json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known)]
    KNOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def products(kernel, form, gives):
    """The multiplications per pair of a query and a key that the kernel's matrix products need in one pass of a loop."""
    d, v = form.d_a + form.d_b, form.v_a + form.v_b
    if "forward" in kernel:
        return d + v
    if "dq_kernel" in kernel:
        return 2 * d + v
    return {"": 2 * d + 2 * v, "dK alone": 2 * d + v, "dV alone": d + v}.get(gives, 3 * d + 2 * v)


def _row(label, launch, known):
    """A row of the launch: its resources, its config, and what the loops execute over what they need."""
    if launch.kernel is not None:
        known[launch.key] = offline.resources(launch.kernel)
    row, options = {"case": label, "key": launch.key, **known[launch.key]}, launch.options
    row["gives"] = GIVES[options.get("SUM", 0)]
    row |= {"bm": options.get("BM"), "bn": options.get("BN"), "edge": options.get("EDGE", "-")}
    if "FORM" not in options:  # not one tile for each pass of a loop
        row |= {"bm": None, "bn": None}
    elif row["bn"]:
        needed = products(row["kernel"], options["FORM"], row["gives"]) * row["bm"] * row["bn"]
        row["executed"] = [round(loop["multiplications"] / needed, 2) for loop in row["loops"]]
    return row


def compile_case(label, case, arch, known, quick=False):
    """Compile a case of `cases` for sm_<arch> and return one row per kernel: its resources, its config and its case.

    Kernels in `known`, {key: resources}, are not compiled; what is compiled is added to it.
    """
    with offline.compile_only(arch, known) as launches, configs_to_compile(quick):
        case()
    rows, seen, keys = [], set(), set()
    for one in launches:
        if one.key in keys:
            continue
        keys.add(one.key)
        row = _row(label, one, known)
        # A kernel's first launch in a case has the first config of its list, which is the default.
        name = (row["kernel"], row["gives"])
        row["chosen"] = name not in seen or row["bn"] is None
        seen.add(name)
        rows.append(row)
    return rows


def collect(quick=False, only=None, archs=(80, 90), known=None, after_case=lambda: None):
    """Compile the cases and return their rows. `after_case` is called after each case."""
    rows, known = [], {} if known is None else known
    for arch in archs:
        for label, case in cases(quick):
            if only and not any(part in label for part in only.split(",")):
                continue
            rows += compile_case(label, case, arch, known, quick)
            after_case()
    return rows


def table(rows):
    head = ["kernel", "case", "sm", "tile", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        tile = f"{row['bm']}x{row['bn']}" if row["bn"] else "-"
        mark = " *" if row["chosen"] and row["bn"] else ""
        cells = [row["kernel"].strip("_") + mark, row["case"], row["arch"], tile, *(row[key] for key in COLUMNS)]
        line = "| " + " | ".join(str(cell) for cell in cells) + " |"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel, with its default config")
    parser.add_argument("--only", help="comma-separated parts of the labels of cases to compile")
    parser.add_argument("--arch", type=int, choices=sorted(offline.SHARED_BYTES))
    parser.add_argument("--known", action="store_true", help="compile only what known_resources.json does not have")
    parser.add_argument("--write", action="store_true", help="as --known, and write what was compiled into that file")
    parser.add_argument(
        "--again", action="store_true", help="compile what the file has, too; exit with 1 if a row differs"
    )
    parser.add_argument(
        "--most", type=int, default=10**9, help="with --known: refuse to compile more kernels than this"
    )
    args = parser.parse_args()
    archs = (args.arch,) if args.arch else (80, 90)
    stored = read_known()
    known = Limited(stored if (args.known or args.write) and not args.again else {}, args.most)

    def write(keep=lambda key: True):
        # Another process may have written meanwhile. A run that is ended keeps the cases that it has compiled.
        both = read_known() | known
        write_known({key: value for key, value in both.items() if keep(key)})

    rows = collect(args.quick, args.only, archs, known, write if args.write else lambda: None)
    if args.write and not (args.quick or args.only or args.arch):
        used = {row["key"] for row in rows}
        write(used.__contains__)  # what is not used any more goes
    print(json.dumps(rows) if args.json else table(rows))
    differ = [row for row in rows if args.again and row["key"] in stored and stored[row["key"]] != known[row["key"]]]
    for row in differ:
        print(f"differs from the file: {row['kernel']} {row['case']} sm_{row['arch']} {row['key']}", file=sys.stderr)
    return int(bool(differ))


class Limited(dict):
    """A dictionary that takes at most `most` new keys."""

    def __init__(self, items, most):
        super().__init__(items)
        self.room = most

    def __setitem__(self, key, value):
        self.room -= key not in self
        if self.room < 0:
            sys.exit("too many kernels have changed: python kernels/benchmarks/resources.py --write")
        super().__setitem__(key, value)


if __name__ == "__main__":
    sys.exit(main())
