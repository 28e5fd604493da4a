"""Measures speed and memory of `convert import` and `convert export`, relative to copying the same folder.

    python benchmarks/convert_streaming.py --layers 32 --work /big/disk

The script writes a Hugging Face folder of the shape of Llama 2 7B with random bf16 weights, copies it, imports it,
exports it, and compares all bits. The copy, the import and the export fsync each file, and files are dropped from the
page cache before they are read. The script needs three times the size of the model on the disk, removes its files at the
end, and prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.hf import split_rules, write_index
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.tensor_file import TensorSpec, write_tensors
from flagscale_like.families import FAMILIES

BUFFER_BYTES = 16 << 20


def make_folder(folder: Path, layers: int) -> int:
    """Write the random model, and return its size in bytes."""
    arch = ModelArch(
        num_layers=layers,
        hidden_size=4096,
        num_attention_heads=32,
        ffn_hidden_size=11008,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    family = FAMILIES["llama"]
    folder.mkdir(parents=True)
    groups = split_rules(family.rules(arch), lambda r: 2 * r.numel, files=1, max_bytes=4 << 30)
    weight_map, total = {}, 0
    for index, rules in enumerate(groups):
        name = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        specs = [
            TensorSpec(hf, torch.bfloat16, shape)
            for r in rules
            for hf, shape in zip(r.hf, r.hf_shapes(arch), strict=True)
        ]
        write_tensors(folder / name, specs, _random(specs), {"format": "pt"})
        weight_map |= dict.fromkeys((spec.name for spec in specs), name)
        total += sum(spec.nbytes for spec in specs)
    write_index(folder, weight_map, total)
    (folder / "config.json").write_text(json.dumps(family.hf_config(arch)))
    return total


def _random(specs: list[TensorSpec]) -> Iterator[Tensor]:
    """Yield a random tensor for each spec. Random bits cannot be compressed by the file system."""
    for spec in specs:
        yield torch.randint(-(1 << 15), 1 << 15, spec.shape, dtype=torch.int16).view(torch.bfloat16)


def drop_pages(folder: Path) -> None:
    """Write the cached pages of a folder's files to the disk, and drop them from the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(source: Path, target: Path) -> float:
    """The seconds to copy a folder, with an fsync of each file."""
    drop_pages(source)
    target.mkdir()
    began = time.perf_counter()
    for path in sorted(source.iterdir()):
        with open(path, "rb", buffering=0) as read, open(target / path.name, "wb", buffering=0) as written:
            shutil.copyfileobj(read, written, BUFFER_BYTES)
            os.fsync(written.fileno())
    return time.perf_counter() - began


def cpu_seconds() -> float:
    """The CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(source: Path, *arguments: str) -> tuple[float, float, int]:
    """Run a flagscale-like command.

    Args:
        source: folder whose files are dropped from the page cache first.

    Returns:
        Seconds, CPU seconds, and the peak of resident bytes of the command and its children, sampled every 20 ms.
    """
    drop_pages(source)
    cpu = cpu_seconds()
    began = time.perf_counter()
    process = psutil.Popen([sys.executable, "-m", "flagscale_like", *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        resident = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                resident += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, resident)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - began, cpu_seconds() - cpu, peak


def same_bits(a: Path, b: Path) -> bool:
    one, other = HfFolder(a), HfFolder(b)
    names = [name for rule in one.rules for name in rule.hf]
    return all(torch.equal(one.hf_tensor(n).view(torch.int16), other.hf_tensor(n).view(torch.int16)) for n in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to measure; must not exist")
    options = parser.parse_args()
    work, workers = options.work.resolve(), ("--workers", str(options.workers))
    work.mkdir(parents=True)
    try:
        hf, native, again = work / "hf", work / "native", work / "again"
        nbytes = make_folder(hf, options.layers)
        copies = [copy(hf, work / "copy")]
        shutil.rmtree(work / "copy")
        imported, import_cpu, import_peak = run(
            hf, "convert", "import", "--hf", str(hf), "--out", str(native), *workers
        )
        out = ("--out", str(again), "--no-verify", "--dtype", "bf16")
        exported, export_cpu, export_peak = run(
            native, "convert", "export", "--checkpoint", str(native), *out, *workers
        )
        shutil.rmtree(native)
        copies.append(copy(hf, work / "copy"))
        copied = min(copies)
        result = {
            "gigabytes": round(nbytes / 1e9, 2),
            "workers": options.workers,
            "copy_s": [round(seconds, 1) for seconds in copies],
            "copy_gb_per_s": round(nbytes / 1e9 / copied, 3),
            "import_s": round(imported, 1),
            "import_cpu_s": round(import_cpu, 1),
            "import_share_of_copy_speed": round(copied / imported, 3),
            "import_peak_resident_gb": round(import_peak / 1e9, 3),
            "export_s": round(exported, 1),
            "export_cpu_s": round(export_cpu, 1),
            "export_share_of_copy_speed": round(copied / exported, 3),
            "export_peak_resident_gb": round(export_peak / 1e9, 3),
            "bit_exact": same_bits(hf, again),
            "load_average": round(os.getloadavg()[1], 1),
            "machine": f"{os.cpu_count()}-core {platform.machine()} CPU machine",
        }
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
