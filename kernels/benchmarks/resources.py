"""Compile the kernels for sm_80 and sm_90 without a GPU, and print the registers, stack and memory that each needs.

    python kernels/benchmarks/resources.py             every kernel, variant and config: the table in docs/kernels.md
    python kernels/benchmarks/resources.py --quick     one variant of each kernel, with its default config
    python kernels/benchmarks/resources.py --json      the same as JSON, for the tests

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

import flagscale_kernels  # noqa: E402, F401  (loads the modules below)
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
COLUMNS = ("warps", "stages", "edge", "registers", "stack", "shared", "blocks_per_sm", "HGMMA", "HMMA")
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
        MODULES["token_permutation"]._sum_rows_triton(meta(S * k, H, dtype=dtype), meta(S, k, dtype=torch.int64))


def cross_entropy(dtype, quick=False):
    module = MODULES["cross_entropy"]
    logits, target, per_token = meta(S, V, dtype=dtype), meta(S, dtype=torch.int64), meta(S, dtype=torch.float32)
    for with_sum in (True,) if quick else (False, True):
        module._statistics_triton(logits, target, 0, with_sum)
    module._gradient_triton(logits, target, per_token, per_token, logits, 0, V, 0.1, 1e-4)


def flash_attention(dtype, d, causal=True, alibi=False, window=-1, packed=False):
    module = MODULES["flash_attention"]
    layout = "tnd" if packed else "sbnd"
    q, k = ((meta(S, n, d, dtype=dtype) if packed else meta(S, B, n, d, dtype=dtype)) for n in (32, 8))
    cu = meta(5, dtype=torch.int32) if packed else None
    slopes = meta(32, dtype=torch.float32) if alibi else None
    options = (slopes, cu, cu, S, S, d**-0.5, window, 0 if causal else -1, layout)
    o, lse = module._forward_triton(q, k, k, *options)
    module._backward_triton(q, None, q, k, k, o, lse, *options)


def piecewise_attention(dtype, d, causal=True):
    module = MODULES["piecewise_attention"]
    q, k = meta(S, B, 32, d, dtype=dtype), meta(S, B, 8, d, dtype=dtype)
    for threshold in (S // 2, S // 2 + 1, 1):  # compiled once: the threshold is not part of the code
        options = (threshold, causal, d**-0.5, "sbnd")
        o, lse = module._forward_triton(q, k, q, k, k, *options)
        module._backward_triton(q, q, k, q, k, k, o, lse, *options)


def cases(quick):
    """(label, function) of each case; the function launches the kernels of a forward and a backward."""
    bf16 = torch.bfloat16
    found = [
        (f.__name__, lambda f=f: f(bf16, quick))
        for f in (rms_norm, layer_norm, rope, gated, token_permutation, cross_entropy)
    ]
    found += [
        ("causal D128", lambda: flash_attention(bf16, 128)),
        ("D128", lambda: piecewise_attention(bf16, 128)),
    ]
    if quick:
        return found
    fp16, fp32 = torch.float16, torch.float32
    return [
        *found,
        ("causal D64", lambda: flash_attention(bf16, 64)),
        ("full D128", lambda: flash_attention(bf16, 128, causal=False)),
        ("ALiBi D128", lambda: flash_attention(bf16, 128, alibi=True)),
        ("window D128", lambda: flash_attention(bf16, 128, window=1023)),
        ("packed D128", lambda: flash_attention(bf16, 128, packed=True)),
        ("causal D96", lambda: flash_attention(bf16, 96)),
        ("causal D256", lambda: flash_attention(bf16, 256)),
        ("causal D128 fp16", lambda: flash_attention(fp16, 128)),
        ("causal D128 fp32", lambda: flash_attention(fp32, 128)),
        ("D64", lambda: piecewise_attention(bf16, 64)),
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


def collect(quick=False, only=None, archs=(80, 90)):
    """Compile the cases and return one row per compiled kernel: its resources, its config and its case."""
    rows = []
    for arch in archs:
        for label, case in cases(quick):
            if only and not any(part in label for part in only.split(",")):
                continue
            with offline.compile_only(arch) as compiled, configs_to_compile(quick):
                case()
            seen, hashes = set(), set()
            for kernel, options in compiled:
                if kernel.hash in hashes:
                    continue
                hashes.add(kernel.hash)
                row = {"case": label, **offline.resources(kernel), "bm": options.get("BM"), "bn": options.get("BN")}
                row["edge"] = options.get("EDGE", "-")
                # A kernel's first launch in a case has the first config of its list, which is the default.
                row["chosen"] = row["kernel"] not in seen or row["bn"] is None
                seen.add(row["kernel"])
                rows.append(row)
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
    args = parser.parse_args()
    rows = collect(args.quick, args.only, (args.arch,) if args.arch else (80, 90))
    print(json.dumps(rows) if args.json else table(rows))


if __name__ == "__main__":
    main()
