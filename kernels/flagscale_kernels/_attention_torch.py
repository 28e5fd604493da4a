"""Attention over bands in plain PyTorch, for the CPU and for what the Triton kernels do not take.

`_bands.py` defines a band and the arithmetic. Queries are processed in chunks, so that a score tensor covers one chunk
of queries at a time. All tensors are [b, n, s, d] views. k and v may have fewer heads than q: the query heads that
share a KV head are then stacked as rows of one product, and k and v are not expanded.

A plain causal band on a CPU goes to PyTorch's own flash attention, which is faster: the keys before the first query in one
call, the square block of the others in a second one, put together by their log-sum-exps.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flagscale_kernels._attention_launch import NO_BOUND, Problem, sink_gradient
from flagscale_kernels._layouts import as_bnsd

CHUNK_SCORES = 1 << 21  # scores computed at a time, over all batch entries and heads


class Band(NamedTuple):
    """The keys that (q, k) score: those from p - left to p + right for a query at position p. None is no bound."""

    q: Tensor
    k: Tensor
    left: int | None
    right: int | None


class Terms(NamedTuple):
    """What scores consist of besides q . k. slopes: [n] or [b, n]; sinks: [n]."""

    scale: float
    cap: float
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        return not self.cap and self.slopes is None and self.sinks is None


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


def _scores(band, start, end, lo, hi, offset, terms):
    """([b, kv heads, group, rows, keys] scores, -inf outside the band; tanh of the scores over their cap, or None)."""
    b, n, _, d = band.q.shape
    groups = band.k.shape[1]
    q = band.q[:, :, start:end].to(band.k.dtype).reshape(b, groups, (n // groups) * (end - start), d)
    s = (q @ band.k[:, :, lo:hi].transpose(2, 3)).mul_(terms.scale).view(b, groups, n // groups, end - start, hi - lo)
    tanh = None
    if terms.cap:
        tanh = s.div_(terms.cap).tanh_()
        s = tanh * terms.cap
    distance = _distance(start, end, lo, hi, offset, s.device)
    if terms.slopes is not None:
        s.sub_(terms.slopes.to(s.dtype).view(-1, groups, n // groups, 1, 1) * distance.abs())
    if band.left is not None:
        s.masked_fill_(distance > band.left, -torch.inf)
    if band.right is not None:
        s.masked_fill_(distance < -band.right, -torch.inf)
    return s, tanh


def _widened(bands, v):
    """The bands and v with keys and values in fp32, or fp64 where they are."""
    compute = torch.promote_types(v.dtype, torch.float32)
    return [band._replace(k=band.k.to(compute)) for band in bands], v.to(compute)


def _is_plain(bands, v, terms):
    band = bands[0]
    causal = len(bands) == 1 and band.left is None and band.right == 0 and terms.plain
    same_width = band.q.shape[3] == v.shape[3]
    return causal and same_width and v.device.type == "cpu" and band.q.shape[2] <= v.shape[2]


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


def attention_forward(bands: list[Band], v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """(o [b, n, seq_q, dv], lse [b, n, seq_q]) of one softmax over all bands, which do not overlap.

    A query without keys gives 0, and its sink or -inf for the LSE.
    """
    plain = _is_plain(bands, v, terms)
    bands, v = _widened(bands, v)
    q = bands[0].q
    if plain:
        o, lse = _plain_forward(q.to(v.dtype), bands[0].k, v, terms.scale)
        return o.to(q.dtype), lse
    b, n, seq_q, _ = q.shape
    groups, offset = v.shape[1], v.shape[2] - seq_q
    o = torch.empty((b, n, seq_q, v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, n, seq_q), dtype=v.dtype, device=q.device)
    for start, end in _chunks(q, bands[0].k):
        ranges = [_key_range(band, start, end - 1, offset) for band in bands]
        parts = [_scores(band, start, end, *r, offset, terms)[0] for band, r in zip(bands, ranges)]
        sums = [s.logsumexp(-1) for s in parts]
        if terms.sinks is not None:
            sums.append(terms.sinks.to(v.dtype).view(groups, n // groups, 1).expand_as(sums[0]))
        chunk_lse = torch.stack(sums).logsumexp(0)
        safe = chunk_lse.masked_fill(chunk_lse == -torch.inf, 0.0)[..., None]
        out: Any = None
        for s, (lo, hi) in zip(parts, ranges):
            p = s.sub_(safe).exp_().view(b, groups, safe.shape[2] * safe.shape[3], hi - lo)
            out = p @ v[:, :, lo:hi] if out is None else out.add_(p @ v[:, :, lo:hi])
        o[:, :, start:end] = out.view(b, n, end - start, v.shape[3])
        lse[:, :, start:end] = chunk_lse.view(b, n, end - start)
    return o, lse


def attention_backward(
    bands: list[Band], v: Tensor, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, terms: Terms
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor | None]:
    """([(dq, dk) of each band], dv, gradient of the sinks), each in its input's dtype and shape.

    delta = sum_d o do is computed as sum_j P dP: here both are in memory, and o is rounded to its dtype.
    """
    narrow, v_dtype = bands, v.dtype
    plain = dlse is None and _is_plain(bands, v, terms)
    bands, v = _widened(bands, v)
    compute = v.dtype
    if plain:
        q, o, do = (t.to(compute) for t in (narrow[0].q, o, do))
        dq, dk, dv = _plain_backward(q, bands[0].k, v, o, do, lse, terms.scale)
        return [(dq.to(narrow[0].q.dtype), dk.to(narrow[0].k.dtype))], dv.to(v_dtype), None
    b, n, seq_q, dim = do.shape
    groups, offset = v.shape[1], v.shape[2] - seq_q
    dqs = [torch.zeros(band.q.shape, dtype=band.q.dtype, device=v.device) for band in narrow]
    dks = [torch.zeros(band.k.shape, dtype=compute, device=v.device) for band in bands]
    dv = torch.zeros(v.shape, dtype=compute, device=v.device)
    deltas = torch.zeros(lse.shape, dtype=compute, device=v.device)
    for start, end in _chunks(bands[0].q, bands[0].k):
        rows = (n // groups) * (end - start)
        grad = do[:, :, start:end].to(compute).reshape(b, groups, rows, dim)
        row_lse = lse[:, :, start:end]
        row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf).reshape(b, groups, rows, 1)
        delta = torch.zeros((b, groups, rows, 1), dtype=compute, device=v.device)
        if dlse is not None:
            delta -= dlse[:, :, start:end].reshape(b, groups, rows, 1)
        parts = []
        for band in bands:
            lo, hi = _key_range(band, start, end - 1, offset)
            s, tanh = _scores(band, start, end, lo, hi, offset, terms)
            p = s.view(b, groups, rows, hi - lo).sub_(row_lse).exp_()
            dv[:, :, lo:hi] += p.transpose(2, 3) @ grad
            ds = (grad @ v[:, :, lo:hi].transpose(2, 3)).mul_(p)
            delta += ds.sum(-1, keepdim=True)
            parts.append((lo, hi, p, ds, tanh))
        deltas[:, :, start:end] = delta.view(b, n, end - start)
        for band, dq, dk, (lo, hi, p, ds, tanh) in zip(bands, dqs, dks, parts):
            ds.sub_(p.mul_(delta)).mul_(terms.scale)
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1.0).view(ds.shape))
            dq[:, :, start:end] = (ds @ band.k[:, :, lo:hi]).view(b, n, end - start, band.q.shape[3])
            q = band.q[:, :, start:end].to(compute).reshape(b, groups, rows, band.q.shape[3])
            dk[:, :, lo:hi] += ds.transpose(2, 3) @ q
    gradients = [(dq, dk.to(band.k.dtype)) for dq, dk, band in zip(dqs, dks, narrow)]
    sinks = None if terms.sinks is None else sink_gradient(terms.sinks, lse, deltas)
    return gradients, dv.to(v_dtype), sinks


# ---------------------------------------------------------------------------------------- problems, one sequence at a time


def _sequences(problem):
    """(slice of the queries, slice of the keys) of each sequence, and its place among the batch entries of a pack."""
    if problem.cu_q is None:
        return [(slice(None), slice(None), None)]
    q, k = problem.cu_q.tolist(), problem.cu_k.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1]), i) for i in range(len(q) - 1)]


def _bound(value):
    return None if value == NO_BOUND else value


def _bands(problem, rows, keys):
    p = problem
    pairs = [[as_bnsd(t, p.layout)[:, :, part] for t, part in zip(pair, (rows, keys))] for pair in p.pairs]
    if len(pairs) == 1:
        return [Band(*pairs[0], _bound(p.left), _bound(p.right))]
    near, far = pairs
    return [Band(*far, None, -p.threshold), Band(*near, p.threshold - 1, _bound(p.right))]


def _terms(problem, entry):
    p = problem
    slopes = p.slopes[entry] if entry is not None and p.slopes is not None and p.slopes.dim() == 2 else p.slopes
    return Terms(p.scale, p.cap, slopes, p.sinks)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """(o, LSE) of a problem."""
    p = problem
    o, lse = p.new_output()
    lse.copy_(p.lse_without_keys())
    o.zero_()
    for rows, keys, entry in _sequences(p):
        bands, v = _bands(p, rows, keys), as_bnsd(p.v, p.layout)[:, :, keys]
        if bands[0].q.numel() == 0 or v.numel() == 0:
            continue
        out, row_lse = attention_forward(bands, v, _terms(p, entry))
        as_bnsd(o, p.layout)[:, :, rows].copy_(out)
        lse[..., rows] = row_lse.view(lse[..., rows].shape)
    return o, lse


def backward(
    problem: Problem, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """([dq, dk of each band, dv], gradient of the sinks) of a problem."""
    p = problem
    gradients = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in p.inputs]
    sinks = None if p.sinks is None else torch.zeros_like(p.sinks)
    for rows, keys, entry in _sequences(p):
        bands, v = _bands(p, rows, keys), as_bnsd(p.v, p.layout)[:, :, keys]
        queries = bands[0].q
        row_lse = lse[..., rows].reshape(queries.shape[:3])
        row_dlse = None if dlse is None else dlse[..., rows].reshape(queries.shape[:3])
        if queries.numel() == 0 or v.numel() == 0:
            if sinks is not None and p.sinks is not None and row_dlse is not None:
                sinks += sink_gradient(p.sinks, row_lse, -row_dlse)
            continue
        out, grad = (as_bnsd(t, p.layout)[:, :, rows] for t in (o, do))
        found, dv, dsinks = attention_backward(bands, v, out, grad, row_lse, row_dlse, _terms(p, entry))
        if sinks is not None and dsinks is not None:
            sinks += dsinks
        parts = [t for pair in reversed(found) for t in pair] if len(found) > 1 else list(found[0])
        for gradient, part, value in zip(gradients, (*(rows, keys) * len(found), keys), (*parts, dv), strict=True):
            as_bnsd(gradient, p.layout)[:, :, part].copy_(value)
    return gradients, sinks
