"""Duplicate documents of a corpus: exact duplicates by hash, near duplicates by MinHash LSH (Broder 1997).

Worker processes reduce each document to a digest or a MinHash signature. The functions here find the duplicates in the
arrays of all digests and signatures; the result depends only on the order of the documents. The signatures and the number of
bands come from the datasketch library. Candidates are found by sorting one band at a time, which takes 16 bytes of memory
for each document; datasketch's own index takes some kilobytes for each.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
import xxhash

PERMUTATIONS = 128
SHINGLE_WORDS = 5


def text_digest(text: str) -> bytes:
    """The 128-bit xxh3 hash of a text, 16 bytes. Equal digests are taken as equal texts."""
    return xxhash.xxh3_128_digest(text.encode("utf-8"))


def minhash_signature(text: str) -> bytes:
    """The MinHash of the five-word shingles of a text, lower-cased and split at white space: 128 values of 4 bytes."""
    words = text.lower().split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]).encode("utf-8") for i in range(count)}
    signature = _empty_signature().copy()
    ordered = sorted(shingles)
    for start in range(
        0, len(ordered), 4096
    ):  # in parts, because datasketch needs a kilobyte of memory for each shingle
        signature.update_batch(ordered[start : start + 4096])
    return signature.hashvalues.astype(np.uint32).tobytes()


@functools.cache
def _empty_signature():  # noqa: ANN202
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """Find exact duplicates.

    Args:
        digests: [n, 16] uint8, one row for each document.

    Returns:
        [n], for each document the number of the first document with the same digest: its own number if it is the first.
    """
    keys = np.ascontiguousarray(digests).view("V16").ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Find near duplicates.

    Documents whose signatures are equal in one band are candidates. Each candidate's whole signature is compared with the
    first candidate of its group and with the candidate before it. Similar documents are joined into clusters, so that two
    documents may be in one cluster only because both are similar to a third.

    Args:
        signatures: [n, 128] uint32, one row for each document; may be a memory map.
        threshold: the estimated Jaccard similarity from which two documents are near duplicates.

    Returns:
        [n] int64, for each document the number of the first document of its cluster.
    """
    from datasketch import MinHashLSH

    # datasketch offers no bands for a higher threshold. The two bands that it gives for 0.98 still find every pair whose
    # signatures differ in one value (an estimated similarity of 0.992).
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
    """Join the clusters of each pair (a[i], b[i]) whose estimated similarity reaches the threshold (union-find)."""
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
    """Convert n byte strings of `width` bytes to an array [n, width] uint8."""
    assert sys.byteorder == "little"
    return np.frombuffer(b"".join(column), dtype=np.uint8).reshape(-1, width)
