"""The workloads of the benchmark: operators with their shapes, and the least traffic or work of each."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import flagscale_kernels as fk


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An operator at one shape. `traffic_bytes` or `flops` has the least that its "forward" and "backward" need."""

    operator: str
    shape: str
    tensors: Callable[[], list[torch.Tensor]]  # makes the arguments of `ours` and `reference`
    ours: Callable
    reference: Callable
    differentiable: tuple[int, ...]  # indices of the tensors that get a gradient
    traffic_bytes: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    added: Callable | None = None  # `ours` with dQ added up by atomics
    other_code: bool = False  # kernels whose code differs from that at the shapes with goals


def workloads(device, tiny=False):
    """All workloads, or one tiny shape of each operator."""
    bf16 = torch.bfloat16

    def rand(*shape, dtype=bf16):
        return torch.randn(*shape, device=device, dtype=dtype)

    def both(elements, forward, backward):
        return {"forward": forward * elements, "backward": backward * elements}

    found = []
    for n, h in [(8, 64)] if tiny else [(4096, 8192), (8192, 4096), (16384, 2048), (262144, 128)]:
        shared: dict[str, Any] = {"shape": f"{n}x{h}", "tensors": lambda n=n, h=h: [rand(n, h), rand(h)]}
        found.append(Workload(
            operator="rms_norm", **shared, differentiable=(0, 1), ours=fk.rms_norm,
            reference=lambda x, w: fk.rms_norm_reference(x, w), traffic_bytes=both(n * h, 4, 6),
        ))  # fmt: skip
        found.append(Workload(
            operator="rms_norm_residual", shape=shared["shape"], differentiable=(0, 1, 2), ours=fk.rms_norm_residual,
            tensors=lambda n=n, h=h: [rand(n, h), rand(n, h), rand(h)],
            reference=lambda x, r, w: (fk.rms_norm_reference(x + r, w), x + r), traffic_bytes=both(n * h, 8, 8),
        ))  # fmt: skip
    for n, h in [(8, 64)] if tiny else [(4096, 8192), (16384, 2048)]:
        found.append(Workload(
            operator="layer_norm", shape=f"{n}x{h}", tensors=lambda n=n, h=h: [rand(n, h), rand(h), rand(h)],
            differentiable=(0, 1, 2), ours=fk.layer_norm,
            reference=lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), traffic_bytes=both(n * h, 4, 6),
        ))  # fmt: skip
    for s, b, n, n_kv, d in [(8, 1, 4, 2, 16)] if tiny else [(8192, 1, 32, 32, 128), (4096, 4, 32, 8, 128)]:
        cos, sin = (t.to(device) for t in fk.rope_tables(fk.rope_frequencies(d)[0], s))
        found.append(Workload(
            operator="rope", shape=f"s{s} b{b} n{n}/{n_kv} d{d}", differentiable=(0, 1),
            tensors=lambda s=s, b=b, n=n, n_kv=n_kv, d=d: [rand(s, b, n, d), rand(s, b, n_kv, d)],
            # Timed out of place: an in-place backward rotates the same gradient again at each repetition.
            ours=lambda q, k, cos=cos, sin=sin: fk.rope(q, k, cos, sin),
            reference=lambda q, k, cos=cos, sin=sin: tuple(
                fk.rope_reference(t, cos[:, None, None], sin[:, None, None]) for t in (q, k)
            ),
            traffic_bytes=both(s * b * (n + n_kv) * d, 4, 4), options={"tables": (cos, sin)},
        ))  # fmt: skip
    for n, f in [(8, 64)] if tiny else [(8192, 32768), (8192, 11008), (16384, 5504)]:
        found.append(Workload(
            operator="swiglu", shape=f"{n}x{f}", tensors=lambda n=n, f=f: [rand(n, 2 * f)], differentiable=(0,),
            ours=fk.swiglu, reference=fk.swiglu_reference, traffic_bytes=both(n * f, 6, 10),
        ))  # fmt: skip
    for n, f in [(8, 64)] if tiny else [(8192, 11008)]:
        found.append(Workload(
            operator="geglu", shape=f"{n}x{f}", tensors=lambda n=n, f=f: [rand(n, 2 * f)], differentiable=(0,),
            ours=fk.geglu, reference=fk.geglu_reference, traffic_bytes=both(n * f, 6, 10),
        ))  # fmt: skip
    for n, h, k in [(8, 64, 2)] if tiny else [(8192, 4096, 2), (8192, 2048, 8)]:
        token, inverse = fk.token_order(torch.rand(n, 2 * k, device=device).topk(k).indices)
        found.append(Workload(
            operator="collect_tokens", shape=f"{n}x{h}, {k} of a token", tensors=lambda n=n, h=h, k=k: [rand(n * k, h)],
            differentiable=(0,), ours=lambda x, token=token, inverse=inverse: fk.collect_tokens(x, token, inverse),
            reference=lambda x, token=token, inverse=inverse: fk.collect_reference(x, token, inverse),
            traffic_bytes=both(n * h, 2 * (k + 1), 2 * (k + 1)),
        ))  # fmt: skip
    for n, v in [(8, 64)] if tiny else [(8192, 131072), (8192, 32000), (4096, 151936)]:
        found.append(Workload(
            operator="cross_entropy", shape=f"{n}x{v}", differentiable=(0,),
            tensors=lambda n=n, v=v: [rand(n, v), torch.randint(v, (n,), device=device)],
            # Timed out of place: an in-place backward overwrites the logits and cannot be repeated. Same traffic.
            ours=lambda x, t: fk.cross_entropy(x, t, inplace_backward=False),
            reference=lambda x, t: F.cross_entropy(x.float(), t), traffic_bytes=both(n * v, 2, 4),
        ))  # fmt: skip
    for n, h, v in [(8, 16, 64)] if tiny else [(8192, 4096, 131072)]:
        found.append(Workload(
            operator="linear_cross_entropy", shape=f"{n}x{h}x{v}", differentiable=(0, 1),
            tensors=lambda n=n, h=h, v=v: [rand(n, h), rand(v, h) * h**-0.5, torch.randint(v, (n,), device=device)],
            ours=fk.fused_linear_cross_entropy,
            reference=lambda x, w, t: F.cross_entropy((x @ w.t()).float(), t),
            flops={"forward": 2.0 * n * h * v, "backward": 4.0 * n * h * v},
        ))  # fmt: skip
    attention = [(1, 4, 2, 16, 16, True)] if tiny else [
        (b, n, n_kv, s, d, causal)
        for d, n in ((128, 16), (64, 32))
        for b, s in ((4, 2048), (2, 8192), (1, 16384))
        for n_kv in (n, n // 4)
        for causal in (True, False)
        if causal or (s == 8192 and n_kv == n)
    ]  # fmt: skip
    for b, n, n_kv, s, d, causal in attention:
        products = 2.0 * b * n * s * s * d * (1 if causal else 2)
        flops = {"forward": products, "backward": 2.5 * products}
        shape = f"b{b} n{n}/{n_kv} s{s} d{d}" + (" causal" if causal else "")

        def heads(b=b, n=n, n_kv=n_kv, s=s, d=d):
            return [rand(b, n, s, d), rand(b, n_kv, s, d), rand(b, n_kv, s, d)]

        found.append(Workload(
            operator="flash_attention", shape=shape, tensors=heads, differentiable=(0, 1, 2),
            ours=lambda q, k, v, c=causal: fk.flash_attention(q, k, v, causal=c),
            added=lambda q, k, v, c=causal: fk.flash_attention(q, k, v, causal=c, deterministic=False),
            reference=lambda q, k, v, c=causal: F.scaled_dot_product_attention(
                q, k, v, is_causal=c, enable_gqa=q.shape[1] != k.shape[1]
            ),
            flops=flops, options={"causal": causal, "heads": n, "kv_heads": n_kv, "d": d},
        ))  # fmt: skip
        if causal:
            found.append(Workload(
                operator="piecewise_attention", shape=f"{shape} threshold {s // 2}", differentiable=(0, 1, 2, 3, 4),
                tensors=lambda heads=heads: [*heads()[:2], *heads()],
                ours=lambda *x, t=s // 2: fk.piecewise_attention(*x, t, causal=True),
                added=lambda *x, t=s // 2: fk.piecewise_attention(*x, t, causal=True, deterministic=False),
                reference=lambda q1, k1, q2, k2, v, t=s // 2: _piecewise(q1, k1, q2, k2, v, t),
                flops=flops, options={"threshold": s // 2, "heads": n, "kv_heads": n_kv, "d": d},
            ))  # fmt: skip
    return [*found, *_other_kernels(rand, tiny)]


def _other_kernels(rand, tiny):
    """Attention whose kernels differ in code from those of plain causal attention: widths, masks, packs, caps, sinks."""
    b, n, s = (1, 4, 16) if tiny else (2, 16, 8192)
    found = []
    variants: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
        ("latent", 192, 128, {}),
        ("wide", 256, 256, {}),
        ("window 1024", 128, 128, {"window": 1023}),
        ("softcap", 128, 128, {"softcap": 50.0}),
        ("sinks", 128, 128, {"sinks": True}),
        ("packed", 128, 128, {"packed": True}),
    )
    for name, d, v, options in variants:
        d, v = (d // 8, v // 8) if tiny else (d, v)
        seen = min(s, options.get("window", s - 1) + 1)  # keys of the last query
        pairs = seen * s - seen * (seen - 1) / 2
        flops = {"forward": 2.0 * b * n * pairs * (d + v), "backward": 2.0 * b * n * pairs * (3 * d + 2 * v)}
        found.append(Workload(
            operator="flash_attention", shape=f"b{b} n{n}/{n} s{s} d{d}/{v} causal {name}", differentiable=(0, 1, 2),
            ours=functools.partial(_attend, options, True), added=functools.partial(_attend, options, False),
            tensors=lambda d=d, v=v: [rand(b, n, s, width) for width in (d, d, v)],
            reference=lambda q, k, v, options=options: fk.attention_reference(
                q, k, v, causal=True, window=options.get("window"), softcap=options.get("softcap", 0.0),
            )[0],
            flops=flops, options={"causal": True, "heads": n, "kv_heads": n, "d": d}, other_code=True,
        ))  # fmt: skip
    return found


def _attend(options: dict[str, Any], deterministic: bool, q, k, v):
    """Causal attention of [b, n, s, d] with the options. "packed": the batch as a pack of its sequences."""
    given: dict[str, Any] = {"causal": True, "deterministic": deterministic}
    given |= {name: options[name] for name in ("window", "softcap") if name in options}
    if "sinks" in options:
        given["sinks"] = torch.zeros(q.shape[1], device=q.device)
    if "packed" not in options:
        return fk.flash_attention(q, k, v, **given)
    b, _, s, _ = q.shape
    ends = torch.arange(0, (b + 1) * s, s, device=q.device, dtype=torch.int32)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    return fk.flash_attention(
        q, k, v, layout="tnd", cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=s, max_seqlen_k=s, **given
    )


def _piecewise(q1, k1, q2, k2, v, threshold):
    """Piecewise attention in plain PyTorch, with both [s, s] scores in memory."""
    group = q1.shape[1] // k1.shape[1]
    k1, k2, v = (t.repeat_interleave(group, 1) for t in (k1, k2, v))
    i = torch.arange(q1.shape[2], device=q1.device)
    distance = i[:, None] - i[None, :]
    s = torch.where(distance >= threshold, q2 @ k2.transpose(2, 3), q1 @ k1.transpose(2, 3)) * q1.shape[-1] ** -0.5
    return s.masked_fill(distance < 0, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
