"""Attention over bands in plain PyTorch, for the CPU.

`_bands.py` defines a band and the arithmetic. Queries are processed in chunks, so that a score tensor covers one chunk
of queries at a time. All tensors are [b, n, s, d] views. k and v may have fewer heads than q: the query heads that
share a KV head are then stacked as rows of one product, and k and v are not expanded.

A plain causal band on a CPU goes to PyTorch's own flash attention, which is faster: the keys before the first query in one
call, the square block of the others in a second one, put together by their log-sum-exps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_SCORES = 1 << 21  # scores computed at a time, over all batch entries and heads


class Band(NamedTuple):
    """The keys that (q, k) score: those from p - left to p + right for a query at position p. None is no bound."""

    q: Tensor
    k: Tensor
    left: int | None
    right: int | None


def _chunks(q, k):
    """Ranges of queries with at most CHUNK_SCORES scores each, or one query where that has more."""
    b, n, seq_q, _ = q.shape
    step = max(1, CHUNK_SCORES // max(1, b * n * k.shape[2]))
    return [(start, min(start + step, seq_q)) for start in range(0, seq_q, step)]


def _key_range(band, first, last, offset):
    """The range of keys that the queries first .. last see; `offset` is seq_k - seq_q."""
    seq_k = band.k.shape[2]
    lo = 0 if band.left is None else max(0, first + offset - band.left)
    hi = seq_k if band.right is None else min(seq_k, last + offset + band.right + 1)
    return lo, max(lo, hi)


def _distance(start, end, lo, hi, offset, device):
    """p - j for each query of [start, end) and key of [lo, hi)."""
    rows = torch.arange(start, end, device=device)[:, None] + offset
    return rows - torch.arange(lo, hi, device=device)[None, :]


def _scores(band, start, end, lo, hi, offset, scale, slopes):
    """[b, kv heads, group, rows, keys], -inf outside the band."""
    b, n, _, d = band.q.shape
    groups = band.k.shape[1]
    q = band.q[:, :, start:end].to(band.k.dtype).reshape(b, groups, (n // groups) * (end - start), d)
    s = (q @ band.k[:, :, lo:hi].transpose(2, 3)).mul_(scale).view(b, groups, n // groups, end - start, hi - lo)
    distance = _distance(start, end, lo, hi, offset, s.device)
    if slopes is not None:
        s.sub_(slopes.to(s.dtype).view(-1, groups, n // groups, 1, 1) * distance.abs())
    if band.left is not None:
        s.masked_fill_(distance > band.left, -torch.inf)
    if band.right is not None:
        s.masked_fill_(distance < -band.right, -torch.inf)
    return s


def _widened(bands, v):
    """The bands and v with keys and values in fp32, or fp64 where they are."""
    compute = torch.promote_types(v.dtype, torch.float32)
    return [band._replace(k=band.k.to(compute)) for band in bands], v.to(compute)


def _is_plain(bands, v, slopes):
    band = bands[0]
    causal = len(bands) == 1 and band.left is None and band.right == 0 and slopes is None
    return causal and v.device.type == "cpu" and band.q.shape[2] <= v.shape[2]


def _plain_blocks(q, k, v):
    """(keys, values, causal) of the square block at the end, and of the keys before it if there are any."""
    offset = k.shape[2] - q.shape[2]
    blocks = [(k[:, :, offset:], v[:, :, offset:], True), (k[:, :, :offset], v[:, :, :offset], False)]
    return blocks if offset else blocks[:1]


def _plain_forward(q, k, v, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = [flash(q, *block[:2], 0.0, block[2], scale=scale) for block in _plain_blocks(q, k, v)]
    if len(parts) == 1:
        return parts[0]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    (o, o_lse), (far, far_lse) = parts
    return o.mul_((o_lse - lse).exp_()[..., None]).addcmul_(far, (far_lse - lse).exp_()[..., None]), lse


def _plain_backward(q, k, v, o, do, lse, scale):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    blocks = _plain_blocks(q, k, v)
    # The scores of both blocks are normalised by the one LSE, so that each gives its part of the gradient.
    parts = [backward(do, q, *block[:2], o, lse, 0.0, block[2], scale=scale) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    (dq, dk, dv), (far_dq, far_dk, far_dv) = parts
    return dq.add_(far_dq), torch.cat((far_dk, dk), 2), torch.cat((far_dv, dv), 2)


def attention_forward(bands: list[Band], v: Tensor, scale: float, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """(o [b, n, seq_q, d], lse [b, n, seq_q]) of one softmax over all bands, which do not overlap.

    A query without keys gives 0, and -inf for the LSE.
    """
    plain = _is_plain(bands, v, slopes)
    bands, v = _widened(bands, v)
    q = bands[0].q
    if plain:
        o, lse = _plain_forward(q.to(v.dtype), bands[0].k, v, scale)
        return o.to(q.dtype), lse
    b, n, seq_q, d = q.shape
    groups, offset = v.shape[1], v.shape[2] - seq_q
    o = torch.empty((b, n, seq_q, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, n, seq_q), dtype=v.dtype, device=q.device)
    for start, end in _chunks(q, bands[0].k):
        ranges = [_key_range(band, start, end - 1, offset) for band in bands]
        parts = [_scores(band, start, end, *r, offset, scale, slopes) for band, r in zip(bands, ranges)]
        chunk_lse = torch.stack([s.logsumexp(-1) for s in parts]).logsumexp(0)
        safe = chunk_lse.masked_fill(chunk_lse == -torch.inf, 0.0)[..., None]
        out = None
        for s, (lo, hi) in zip(parts, ranges):
            p = s.sub_(safe).exp_().view(b, groups, safe.shape[2] * safe.shape[3], hi - lo)
            out = p @ v[:, :, lo:hi] if out is None else out.add_(p @ v[:, :, lo:hi])
        o[:, :, start:end] = out.view(b, n, end - start, d)
        lse[:, :, start:end] = chunk_lse.view(b, n, end - start)
    return o, lse


def attention_backward(
    bands: list[Band], v: Tensor, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, scale: float,
    slopes: Tensor | None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:  # fmt: skip
    """([(dq, dk) of each band], dv), each in its input's dtype and shape."""
    narrow, v_dtype = bands, v.dtype
    bands, v = _widened(bands, v)
    compute = v.dtype
    if dlse is None and _is_plain(narrow, v, slopes):
        q, o, do = (t.to(compute) for t in (narrow[0].q, o, do))
        dq, dk, dv = _plain_backward(q, bands[0].k, v, o, do, lse, scale)
        return [(dq.to(narrow[0].q.dtype), dk.to(narrow[0].k.dtype))], dv.to(v_dtype)
    b, n, seq_q, d = o.shape
    groups, offset = v.shape[1], v.shape[2] - seq_q
    dqs = [torch.zeros(band.q.shape, dtype=band.q.dtype, device=v.device) for band in narrow]
    dks = [torch.zeros(band.k.shape, dtype=compute, device=v.device) for band in bands]
    dv = torch.zeros(v.shape, dtype=compute, device=v.device)
    for start, end in _chunks(o, bands[0].k):
        rows = (n // groups) * (end - start)
        grad = do[:, :, start:end].to(compute)
        delta = (grad * o[:, :, start:end]).sum(-1)
        if dlse is not None:
            delta = delta - dlse[:, :, start:end]
        delta = delta.view(b, groups, rows, 1)
        grad = grad.reshape(b, groups, rows, d)
        row_lse = lse[:, :, start:end]
        row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf).reshape(b, groups, rows, 1)
        for band, dq, dk in zip(bands, dqs, dks):
            lo, hi = _key_range(band, start, end - 1, offset)
            if lo == hi:
                continue
            p = _scores(band, start, end, lo, hi, offset, scale, slopes).view(b, groups, rows, hi - lo)
            p.sub_(row_lse).exp_()
            dv[:, :, lo:hi] += p.transpose(2, 3) @ grad
            ds = (grad @ v[:, :, lo:hi].transpose(2, 3)).sub_(delta).mul_(p).mul_(scale)
            dq[:, :, start:end] = (ds @ band.k[:, :, lo:hi]).view(b, n, end - start, d)
            dk[:, :, lo:hi] += ds.transpose(2, 3) @ band.q[:, :, start:end].to(compute).reshape(b, groups, rows, d)
    gradients = [(dq, dk.to(band.k.dtype)) for dq, dk, band in zip(dqs, dks, narrow)]
    return gradients, dv.to(v_dtype)
