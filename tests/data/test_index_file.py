"""Our .idx is megatron-core's."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from flagscale_like.data.index_file import DTYPES, read_lengths, read_tokens, token_dtype, write_index


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 150_000])
def test_the_index_is_the_one_that_megatron_core_writes(tmp_path, vocab_size):
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))
    lengths = np.array([3, 1, 200, 7], dtype=np.int32)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    documents = [torch.arange(n) + n for n in lengths]
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_index(tmp_path / "ours.idx", [lengths[:1], lengths[1:1], lengths[1:]], token_dtype(vocab_size))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    prefix = str(tmp_path / "theirs")
    assert read_lengths(prefix).tolist() == lengths.tolist()
    theirs = IndexedDataset(prefix)
    for number, ids in enumerate(documents):
        assert read_tokens(prefix, lengths, number).tolist() == ids.tolist() == theirs[number].tolist()


def test_token_types_have_megatron_cores_codes():
    for code, name in DTYPES.items():
        assert np.dtype(DType.dtype_from_code(code)) == np.dtype(name)
