"""Pack: the bounds of the documents that lie one after another in a row, as megatron-core hands them to core attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Pack(PackedSeqParams):
    """megatron-core's packed_seq_params of one row of t tokens. Make one with `packing`.

    Attributes:
        bounds: 0, ..., t: where each document begins, and the end, on the host. cu_seqlens_q and cu_seqlens_kv are the same
            on the device.
    """

    bounds: tuple[int, ...] = ()


def packing(documents: Tensor, device: torch.device) -> Pack:
    """The pack of a batch's documents; nothing waits for the device.

    Args:
        documents: int32 [n + 1] on the host; see Batch.documents.
        device: of the model.
    """
    bounds = tuple(documents.tolist())
    moved = documents.to(device, non_blocking=True)
    longest = max(stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True))
    return Pack(
        qkv_format="thd",
        cu_seqlens_q=moved,
        cu_seqlens_kv=moved,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
    )
