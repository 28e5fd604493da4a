"""Measure every kernel on this machine's CUDA device and compare it with other implementations and with the card.

    python kernels/benchmarks/run.py                   all operators; writes JSON and plots to kernels/benchmarks/results/
    python kernels/benchmarks/run.py --only rms,flash  operators whose name contains one of these
    python kernels/benchmarks/run.py --smoke           run each operator once on the CPU at a tiny size; measures nothing

Times are medians of triton.testing.do_bench. For memory-bound operators it reports GB/s of the least traffic that the
operator needs, and the share of the card's measured copy bandwidth. For attention and the fused output layer it reports
TFLOP/s of the products that the mask does not remove, and the share of the card's measured matrix rate. It skips
implementations that are not installed. Without a CUDA device it prints so and exits with 0.
"""

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
import workloads  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"


def milliseconds(call):
    import triton

    return triton.testing.do_bench(call, warmup=25, rep=200, return_mode="median")


def copy_gb_per_s():
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def matrix_tflop_per_s(n=8192):
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b) / 1e9


def versions():
    import importlib.metadata

    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "liger-kernel", "flash-attn", "flag-attn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def passes(workload, provider):
    """{"forward": call, "backward": call} of a provider. The forward call runs without autograd."""
    tensors = workload.tensors()
    call = provider(workload)

    def forward():
        with torch.no_grad():
            return call(*tensors)

    leaves = [t.requires_grad_() if t.is_floating_point() and i in workload.differentiable else t
              for i, t in enumerate(tensors)]  # fmt: skip
    wanted = [t for t in leaves if t.requires_grad]
    out = call(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    out = [o for o in out if o.requires_grad]
    grads = [torch.randn_like(o) for o in out]

    def backward():
        return torch.autograd.grad(out, wanted, grads, retain_graph=True)

    return {"forward": forward, "backward": backward}


def measure(workload, card):
    """Rows of time and rate, one for each provider and direction of the workload; each is printed as it is measured."""
    rows = []
    for name, provider in workloads.providers(workload).items():
        try:
            calls = passes(workload, provider)
            for direction, call in calls.items():
                time_ms = milliseconds(call)
                row = {"operator": workload.operator, "shape": workload.shape, "provider": name,
                       "direction": direction, "milliseconds": time_ms}  # fmt: skip
                if workload.flops:
                    rate = workload.flops[direction] / time_ms / 1e9
                    row |= {"tflop_per_s": rate, "of_matrix_rate": rate / card["matrix_tflop_per_s"]}
                else:
                    rate = workload.traffic_bytes[direction] / time_ms / 1e6
                    row |= {"gb_per_s": rate, "of_copy": rate / card["copy_gb_per_s"]}
                rows.append(row)
                print(json.dumps(row), flush=True)
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            # Another implementation may not support a shape or this version: report it and go on.
            first = (str(error).splitlines() or [""])[0]
            print(f"{workload.operator} {workload.shape}: {name} left out: {type(error).__name__}: {first}", flush=True)
        torch.cuda.empty_cache()
    return rows


def plot(rows, path):
    """Write a bar chart of each operator next to `path`."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for operator in sorted({row["operator"] for row in rows}):
        mine = [row for row in rows if row["operator"] == operator]
        figure, axes = plt.subplots(1, 2, figsize=(14, 5), squeeze=False)
        for axis, direction in zip(axes[0], ("forward", "backward")):
            part = [row for row in mine if row["direction"] == direction]
            unit = "tflop_per_s" if part and "tflop_per_s" in part[0] else "gb_per_s"
            shapes = list(dict.fromkeys(row["shape"] for row in part))
            names = list(dict.fromkeys(row["provider"] for row in part))
            for i, name in enumerate(names):
                rates = {row["shape"]: row[unit] for row in part if row["provider"] == name}
                places = [j + i * 0.8 / len(names) for j in range(len(shapes))]
                axis.bar(places, [rates.get(s, 0.0) for s in shapes], width=0.8 / len(names), label=name)
            axis.set_xticks([j + 0.4 for j in range(len(shapes))], shapes, rotation=30, ha="right", fontsize=7)
            axis.set_ylabel(unit)
            axis.set_title(f"{operator} {direction}")
            axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path.with_name(f"{path.stem}-{operator}.png"), dpi=120)
        plt.close(figure)


def smoke(chosen):
    """Run every workload once on the CPU with every installed provider."""
    for workload in chosen(workloads.workloads("cpu", tiny=True)):
        for name, provider in workloads.providers(workload).items():
            calls = passes(workload, provider)
            for call in calls.values():
                call()
            print(f"{workload.operator} {workload.shape}: {name} ran")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated parts of operators' names")
    parser.add_argument("--smoke", action="store_true", help="run each operator once on the CPU; measure nothing")
    args = parser.parse_args()
    parts = [part for part in args.only.split(",") if part]

    def chosen(found):
        return [w for w in found if not parts or any(part in w.operator for part in parts)]

    if args.smoke:
        smoke(chosen)
        return
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    card = {"copy_gb_per_s": copy_gb_per_s(), "matrix_tflop_per_s": matrix_tflop_per_s()}
    print(json.dumps(card), flush=True)
    rows = [row for workload in chosen(workloads.workloads("cuda")) for row in measure(workload, card)]
    device = torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.UTC)
    report = {"device": device, "date": now.isoformat(timespec="seconds"), "versions": versions(), "card": card}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{device.replace(' ', '_')}-{now:%Y%m%d-%H%M}.json"
    path.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    plot(rows, path)
    print(path)


if __name__ == "__main__":
    main()
