"""Duplicates over a whole corpus, exact by hash and near by MinHash LSH (Broder 1997), with arrays and not objects.

The workers reduce each document to a digest or a signature; what is decided here depends on their order alone. Signatures
and their banding follow datasketch, which also chooses the bands; they are compared by sorting one band at a time, so that
memory holds 16 bytes a document, where datasketch's own index holds some kilobytes.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
import xxhash

PERMUTATIONS = 128
SHINGLE_WORDS = 5


def text_digest(text: str) -> bytes:
    """16 bytes that two texts share if, for all practical purposes, they are the same."""
    return xxhash.xxh3_128_digest(text.encode("utf-8"))


def minhash_signature(text: str) -> bytes:
    """MinHash of a text's five-word shingles, case and white space aside: 128 values of 4 bytes."""
    words = text.lower().split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]).encode("utf-8") for i in range(count)}
    signature = _empty_signature().copy()
    ordered = sorted(shingles)
    for start in range(0, len(ordered), 4096):  # datasketch takes a kilobyte a shingle
        signature.update_batch(ordered[start : start + 4096])
    return signature.hashvalues.astype(np.uint32).tobytes()


@functools.cache
def _empty_signature():  # noqa: ANN202
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """For each of n documents, the first with the same digest; its own number for that one.

    Args:
        digests: [n, 16] uint8.
    """
    keys = np.ascontiguousarray(digests).view("V16").ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each of n documents, the first of those that it resembles, directly or through others; else its own number.

    Documents that agree in a band are compared by their whole signatures, each with the first of its group and with the
    one before it.

    Args:
        signatures: [n, 128] uint32; may be a memory map.
        threshold: estimated Jaccard resemblance from which on two documents count as one.
    """
    from datasketch import MinHashLSH

    # Above, datasketch has no bands to offer; two halves find all that differ in one value, which is 0.992 alike.
    lsh = MinHashLSH(threshold=min(threshold, 0.98), num_perm=PERMUTATIONS)
    parents = np.arange(len(signatures))
    for band in range(lsh.b):
        columns = signatures[:, band * lsh.r : (band + 1) * lsh.r]
        keys = _band_keys(columns)
        order = np.argsort(keys, kind="stable")
        held = keys[order]
        starts = np.flatnonzero(np.r_[True, held[1:] != held[:-1]]) if len(held) else np.zeros(0, int)
        sizes = np.diff(np.r_[starts, len(held)])
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            group = order[start : start + size]
            for other in (np.full(size - 1, group[0]), group[:-1]):
                _join(parents, group[1:], other, signatures, threshold)
    return np.array([_root(parents, i) for i in range(len(parents))], dtype=np.int64)


def _band_keys(columns: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row: FNV-1a over its 32-bit values."""
    keys = np.full(len(columns), 0xCBF29CE484222325, dtype=np.uint64)
    for column in range(columns.shape[1]):
        keys = (keys ^ columns[:, column].astype(np.uint64)) * np.uint64(0x100000001B3)
    return keys


def _join(parents: np.ndarray, a: np.ndarray, b: np.ndarray, signatures: np.ndarray, threshold: float) -> None:
    for start in range(0, len(a), 4096):
        ours, theirs = a[start : start + 4096], b[start : start + 4096]
        alike = (signatures[ours] == signatures[theirs]).mean(axis=1) >= threshold
        for one, other in zip(ours[alike], theirs[alike], strict=True):
            low, high = sorted((_root(parents, one), _root(parents, other)))
            parents[high] = low


def _root(parents: np.ndarray, i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return int(i)


def digests_of(column: list[bytes], width: int) -> np.ndarray:
    """A column of equally long byte strings as [n, width] uint8."""
    assert sys.byteorder == "little"
    return np.frombuffer(b"".join(column), dtype=np.uint8).reshape(-1, width)
