"""Measures the cost, for one rank, of planning the load of a checkpoint that thousands of ranks saved.

    python benchmarks/checkpoint_scale.py --ranks 256 1024 4096 16384 --folder /path/on/the/disk
    python benchmarks/checkpoint_scale.py --ranks 1024 --folder /path/on/the/disk --no-index

For each number of ranks, the script makes a folder with one file per rank. A file has 60 fragments of two elements, each
with a weight and two moments, so that nearly all of the cost is planning: headers, index, search. The saving layout has 8
tensor-parallel ranks and 32 replicas (--replicas); the number of pipeline stages follows from the number of ranks. More
ranks therefore save a larger model, unless the replicas grow with them. A separate process then loads the tensors of one
rank in the middle of the layout:

    own range     the range of each tensor whose optimizer state the rank holds, on the layout that saved
    and weights   also the rank's whole weights, from as many files as the layout has replicas
    half tp       both, on half as many tensor-parallel ranks: twice the elements

The script prints the seconds to make the reader, the seconds of all reads, the number of rank files opened, and the
memory of both: the process's own memory, and file pages, which the processes of a node share. With `--no-index`, the
folder has no index, as older versions saved it. `--read FOLDER` measures an existing folder. It calls only functions that
earlier versions of the reader have, so that they can be measured with PYTHONPATH set to their source.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.fragments import Fragment

TENSORS = 60  # tensors of a pipeline stage; each rank has a fragment of each
TP = 8
KINDS = ("param", "exp_avg", "exp_avg_sq")
LOADS = ("own range", "and weights", "half tp")


@dataclass(frozen=True)
class Layout:
    """The layout of the ranks that saved. Rank (stage, replica, shard) has the number (stage * dp + replica) * tp + shard."""

    stages: int
    dp: int
    tp: int = TP

    @property
    def ranks(self) -> int:
        return self.stages * self.dp * self.tp

    def weights(self, stage: int, shard: int, tp: int) -> Iterator[Fragment]:
        """Yield a rank's whole parameters on `tp` ranks. Even tensors are split by rows, odd ones by columns."""
        for number in range(TENSORS):
            rows, columns = (self.tp * self.dp, 2) if number % 2 == 0 else (self.dp, 2 * self.tp)
            local = (rows // tp, columns) if number % 2 == 0 else (rows, columns // tp)
            offset = (shard * local[0], 0) if number % 2 == 0 else (0, shard * local[1])
            key = f"decoder.layers.{stage * 5 + number // 12}.tensor_{number % 12}.weight"
            yield Fragment(key, (rows, columns), offset, local, 0, prod(local))

    def own(self, stage: int, replica: int, shard: int, tp: int) -> Iterator[Fragment]:
        """Yield the range that a rank owns of each of its parameters."""
        for whole in self.weights(stage, shard, tp):
            low, high = (whole.stop * at // self.dp for at in (replica, replica + 1))
            yield Fragment(whole.key, whole.global_shape, whole.offset, whole.shape, low, high)


def make(folder: Path, layout: Layout, *, index: bool) -> dict[str, float]:
    """Save a checkpoint of all ranks of the layout. Return the cost of the part that rank 0 does."""
    # Imported here, because earlier versions, which --read measures, lack these functions.
    from flagscale_like.checkpoint.format import finish_folder, specs_of, write_fragments
    from flagscale_like.checkpoint.manifest import INDEX, MANIFEST, read_manifest, write_json, write_manifest

    folder.mkdir()
    tensors = [(f"{i}.{kind}", torch.full((2,), float(i))) for i in range(TENSORS) for kind in KINDS]
    specs, written = specs_of(tensors), []
    for rank in range(layout.ranks):
        stage, replica, shard = rank // (layout.dp * TP), rank // TP % layout.dp, rank % TP
        fragments = list(layout.own(stage, replica, shard, TP))
        path = folder / f"rank_{rank:05d}.safetensors"
        written.append(write_fragments(path, fragments, (tensor for _, tensor in tensors), specs))
    state = write_json(folder / "state.json", {"step": 1, "layout": asdict(layout)})
    began = time.perf_counter()
    finish_folder(folder, written, [state])
    cost = {
        "publish_s": time.perf_counter() - began,
        "gathered_mb": sum(len(file.rows) for file in written) / 1e6,
        "index_mb": (folder / INDEX).stat().st_size / 1e6,
        "manifest_mb": (folder / MANIFEST).stat().st_size / 1e6,
    }
    if not index:
        write_manifest(folder, read_manifest(folder))
        (folder / INDEX).unlink()
    return cost


def memory_mb() -> tuple[float, float]:
    """The memory of this process in MiB: its own pages, and the pages of files that it has mapped."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    return kib["Anonymous"] / 1024, (kib["Rss"] - kib["Anonymous"]) / 1024


def read(folder: Path, load: str) -> dict[str, float]:
    """Load the tensors of one rank. Return the seconds, the number of opened files, and the memory."""
    torch.set_num_threads(1)
    layout = Layout(**json.loads((folder / "state.json").read_text())["layout"])
    tp = TP // 2 if load == "half tp" else TP
    stage, replica, shard = layout.stages // 2, layout.dp // 2, tp // 2
    wanted = [(kind, target) for target in layout.own(stage, replica, shard, tp) for kind in KINDS]
    if load != "own range":
        wanted += [("param", target) for target in layout.weights(stage, shard, tp)]
    opened: set[str] = set()
    sys.addaudithook(
        lambda event, args: opened.add(str(args[0])) if event == "open" and "rank_" in str(args[0]) else None
    )
    own, files = memory_mb()
    began, cpu = time.perf_counter(), time.process_time()
    reader = CheckpointReader(folder)
    made = time.perf_counter()
    for kind, target in wanted:
        reader.read(kind, target, torch.empty(target.numel))
    done, own_after, files_after = time.perf_counter(), *memory_mb()
    return {
        "reader_s": made - began,
        "reads_s": done - made,
        "cpu_s": time.process_time() - cpu,
        "opened": len(opened),
        "own_mb": own_after - own,
        "file_pages_mb": files_after - files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--replicas", type=int, default=32, help="data-parallel ranks of the layout that saves")
    parser.add_argument("--folder", type=Path, help="folder in which temporary folders are made")
    parser.add_argument("--no-index", action="store_true", help="save without an index, as older versions did")
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument(
        "--keep", action="store_true", help="do not remove the folders, so that --read can measure them"
    )
    parser.add_argument("--read", type=Path, help="measure this folder and print JSON")
    options = parser.parse_args()
    if any(ranks % (TP * options.replicas) for ranks in options.ranks):
        parser.error(f"--ranks must be multiples of {TP} x --replicas")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if options.read:
        print(json.dumps(read(options.read, options.loads[0])))
        return
    root = Path(tempfile.mkdtemp(prefix="checkpoint_scale_", dir=options.folder))
    try:
        for ranks in options.ranks:
            layout = Layout(ranks // (TP * options.replicas), options.replicas)
            folder = root / f"ranks_{ranks}"
            cost = make(folder, layout, index=not options.no_index)
            print(
                f"{ranks} ranks ({layout}):",
                ", ".join(f"{name} {value:.2f}" for name, value in cost.items()),
                flush=True,
            )
            for load in options.loads:
                command = [sys.executable, __file__, "--read", str(folder), "--loads", load]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
                out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                found = json.loads(out)
                print(f"  {load:12}", ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
            if not options.keep:
                shutil.rmtree(folder)
    finally:
        if options.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
