"""Counts the bytes that all ranks together read of a checkpoint or of a Hugging Face folder, and times the load.

    python benchmarks/load_reads.py --ranks 4 [--tp 2] --folder /path/on/the/disk

The script saves a bf16 model on that many ranks, without a step, and exports it. Then the same number of ranks
go on from the checkpoint, begin a new run from it (`checkpoint.load`), and begin one from the Hugging Face folder
(`checkpoint.init_from_hf`). A part of a checkpoint's file counts with the bytes that are copied out of it, a Hugging Face
tensor with all of its bytes each time that a rank asks for it, or with those of the rows that it asks for. The check of all
files at the start of a run is counted apart. The script calls only what earlier versions have, so that they can be measured
with PYTHONPATH set to their source.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from flagscale_like.checkpoint import manifest, store
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import RunConfig
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.run import start
from tests.harness import run_ranks, tiny_config

MODEL = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 1408,
    "vocab_size": 32000,
    "position": {"kind": "rope"},
}


def config_of(run_dir: Path, tp: int, **changes: Any) -> RunConfig:
    """A run of the model in bf16."""
    return tiny_config(run_dir, model=MODEL, train__precision="bf16", parallel={"tp": tp}, **changes)


def save(config: RunConfig) -> None:
    """On each rank: build the model, and save it as it is."""
    with parallel_context(config.parallel) as ctx:
        begun = start(config, ctx)
        state: dict[str, Any] = {
            "step": 0,
            "consumed_samples": 0,
            "skipped_steps": 0,
            "train_samples": begun.progress.train_samples,
        }
        state |= {
            "learning_rate_steps": 0,
            "layout": store.layout_record(ctx),
            "config": config.model_dump(mode="json"),
        }
        state |= {"model": config.model.model_dump(mode="json"), **begun.engine.state()}
        begun.store.save(0, begun.engine.fragments, state)
        begun.store.finish()


def load(config: RunConfig) -> tuple[int, int, float]:
    """On each rank: begin the run; bytes read for the check and for the load, and the seconds of both."""
    checked, read = [0], [0]  # sizes: several threads append to a list, and would overwrite a number
    check, copy, tensor = manifest.check_file, CheckpointReader._copy, HfFolder.hf_tensor

    def counted_check(folder: Path, record: manifest.FileRecord) -> str | None:
        checked.append(record.size_bytes)
        return check(folder, record)

    def counted_copy(reader: Any, row: Any, kind: str, target: Any, out: Any) -> int:
        copied = copy(reader, row, kind, target, out)
        read.append(copied * reader.dtype(target.key, kind).itemsize)
        return copied

    def counted_tensor(folder: HfFolder, name: str, **options: Any) -> Any:
        found = tensor(folder, name, **options)
        read.append(found.nbytes if options.get("whole", True) else 0)  # else a few bytes of it are read, or rows
        return found

    rows = HfFolder.rows

    def counted_rows(folder: HfFolder, rule: Any, first: int, stop: int) -> Any:
        found = rows(folder, rule, first, stop)
        read.append(found.nbytes if stop - first < rule.shape[0] else 0)  # all rows: counted_tensor has counted them
        return found

    for owner, name, counted in (
        (store, "check_file", counted_check),
        (CheckpointReader, "_copy", counted_copy),
        (HfFolder, "hf_tensor", counted_tensor),
        (HfFolder, "rows", counted_rows),
    ):
        setattr(owner, name, counted)
    with parallel_context(config.parallel) as ctx:
        ctx.barrier()
        began = time.perf_counter()
        start(config, ctx)
        ctx.barrier()
        return sum(checked), sum(read), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks among them")
    parser.add_argument("--folder", type=Path, help="where the files are written; they are removed at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        run, hf = Path(root) / "run", Path(root) / "hf"
        run_ranks(options.ranks, save, config_of(run, options.tp))
        saved = run / "checkpoints" / "step_00000000"
        export(CheckpointReader(saved), hf)
        loads = {
            "go on from the checkpoint": (saved, config_of(run, options.tp)),
            "checkpoint.load": (saved, config_of(Path(root) / "a", options.tp, checkpoint__load=str(run))),
            "checkpoint.init_from_hf": (hf, config_of(Path(root) / "b", options.tp, checkpoint__init_from_hf=str(hf))),
        }
        for name, (folder, config) in loads.items():
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != manifest.INDEX)
            found = run_ranks(options.ranks, load, config)
            checked, read = (sum(one[place] for one in found) for place in (0, 1))
            print(
                f"{name}: files of {size / 1e6:,.1f} MB; {options.ranks} ranks read {read / 1e6:,.1f} MB to load "
                f"({read / size:.2f} x), {checked / 1e6:,.1f} MB to check; {max(one[2] for one in found):.1f} s"
            )


if __name__ == "__main__":
    main()
