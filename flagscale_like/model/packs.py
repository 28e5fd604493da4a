"""Pack: the bounds of the documents that lie one after another in a row, as megatron-core hands them to core attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Pack(PackedSeqParams):
    """megatron-core's packed_seq_params of one row of t tokens. Make one with `packing`.

    Attributes:
        bounds: 0, ..., t: where each document begins, and the end, on the host. cu_seqlens_q and cu_seqlens_kv are the same
            on the device.
        rows: rows of the batch that the pack's row consists of. Context-parallel ranks hold a part of each of them.
        plan: what model.context_parallel makes of the bounds, once for all layers.
    """

    bounds: tuple[int, ...] = ()
    rows: int = 1
    plan: Any = None


def packing(documents: Tensor, device: torch.device, rows: int) -> Pack:
    """The pack of a batch's documents; nothing waits for the device.

    Args:
        documents: int32 [n + 1] on the host; see Batch.documents. With context parallelism, of the whole rows.
        device: of the model.
        rows: of the batch.
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
        rows=rows,
    )
