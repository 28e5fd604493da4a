"""Compares the tokens/s of `preprocess` with a plain loop that tokenizes one document at a time in one process for each core.

The plain loop is the usual tool of pretraining repositories: a pool of processes maps over the lines of the corpus,
parses the JSON, calls the tokenizer on one document, and returns the ids to the parent process, which appends them to the
.bin/.idx with megatron-core's builder. The loop is timed with transformers' tokenizer and with the `tokenizers` library,
alternating with `preprocess`. The corpus is the source of the Python standard library in documents of about 2,000
characters. The outputs must be equal.

    python benchmarks/preprocess.py [--megabytes 20] [--rounds 3] [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.readers import find_inputs, read_documents
from flagscale_like.data.tokenizer import Tokenizer, train_bpe

_encode: Callable[[str], list[int]]  # _start() makes it


def _start(kind: str, folder: str) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if kind == "transformers":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        _encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    else:
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_file(f"{folder}/tokenizer.json")
        _encode = lambda text: fast.encode(text, add_special_tokens=False).ids  # noqa: E731


def _one(line: str) -> list[int]:
    return _encode(json.loads(line)["text"])


def plain_loop(kind: str, corpus: Path, folder: Path, prefix: Path, processes: int) -> float:
    """The seconds from the first line to the finished index, without the start of the processes."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    words = Tokenizer(folder)
    with multiprocessing.get_context("spawn").Pool(processes, _start, (kind, str(folder))) as pool:
        pool.map(_one, ['{"text": "warm"}'] * processes * 4)
        began = time.perf_counter()
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(words.vocab_size))
        with open(corpus, encoding="utf-8") as lines:
            for ids in pool.imap(_one, lines, chunksize=32):
                builder.add_document(torch.tensor([*ids, words.eod]), [len(ids) + 1])
        builder.finalize(f"{prefix}.idx")
        return time.perf_counter() - began


def time_preprocess(corpus: Path, folder: Path, prefix: Path, processes: int) -> tuple[float, int]:
    """The seconds of `preprocess`, with the start of the processes, and the number of tokens."""
    began = time.perf_counter()
    report = preprocess([corpus], folder, prefix, workers=processes)
    return time.perf_counter() - began, report.tokens


def write_corpus(path: Path, megabytes: float, characters: int = 2000) -> None:
    """Write the source of Python's standard library, repeated up to the size; each repetition cuts it at other places."""
    size, turn = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while True:
            for document in read_documents(find_inputs(["python-stdlib"]), bad_lines="skip"):
                for start in range(turn * 37, len(document.text), characters):
                    text = document.text[start : start + characters]
                    size += file.write(json.dumps({"text": text}) + "\n")
                    if size >= megabytes * 1e6:
                        return
            turn += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vocab-size", type=int, default=16_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        corpus, folder = root / "corpus.jsonl", root / "tokenizer"
        write_corpus(corpus, options.megabytes)
        train_bpe((d.text for d, _ in zip(read_documents([corpus]), range(2000))), options.vocab_size, folder)
        seconds: dict[str, list[float]] = {"preprocess": [], "tokenizers": [], "transformers": []}
        for _ in range(options.rounds):
            spent, tokens = time_preprocess(corpus, folder, root / "preprocess", options.processes)
            seconds["preprocess"].append(spent)
            for kind in ("tokenizers", "transformers"):
                seconds[kind].append(plain_loop(kind, corpus, folder, root / kind, options.processes))
                for suffix in (".bin", ".idx"):
                    same = (root / f"preprocess{suffix}").read_bytes() == (root / f"{kind}{suffix}").read_bytes()
                    assert same, f"{kind}{suffix} differs from the output of preprocess"
        print(f"{corpus.stat().st_size / 1e6:.1f} MB, {tokens:,} tokens, {options.processes} processes")
        for kind, times in seconds.items():
            ratios = [theirs / mine for theirs, mine in zip(times, seconds["preprocess"], strict=True)]
            print(
                f"{kind:>12}: {tokens / statistics.median(times):,.0f} tokens/s (median of {options.rounds}); "
                f"time / time of `preprocess`: median {statistics.median(ratios):.2f}, lowest {min(ratios):.2f}"
            )


if __name__ == "__main__":
    main()
