"""The variants of the operators other than attention."""

from typing import Any

import torch
from accuracy import seeded
from variant import BF16, FP16, SHORT, Variant, gradients, tensors_of

import flagscale_kernels as fk


def _rms_norm(shape, dtype, rounding, residual, offset=0.0):
    options: dict[str, Any] = {"rounding": rounding, "weight_offset": offset}

    def make(device):
        inputs = tensors_of(device, dtype, *(shape,) * (1 + residual), shape[-1:])
        if not residual:
            return (
                lambda x, w: fk.rms_norm(x, w, **options),
                lambda x, w: fk.rms_norm_reference(x, w, **options),
                inputs,
                gradients(device, shape),
            )
        return (
            lambda x, r, w: fk.rms_norm_residual(x, r, w, **options),
            lambda x, r, w: (fk.rms_norm_reference(x + r, w, **options), x + r),
            inputs,
            gradients(device, shape, shape),
        )

    return make


def _layer_norm(shape, dtype):
    def make(device):
        inputs = tensors_of(device, dtype, shape, shape[-1:], shape[-1:])
        return fk.layer_norm, fk.layer_norm_reference, inputs, gradients(device, shape)

    return make


def _rope(s, dtype, r=128, d=128, interleaved=False, inplace=False, same=False, ids=False):
    def make(device):
        cos, sin = (t.to(device) for t in fk.rope_tables(fk.rope_frequencies(r)[0], s))
        shapes = [(s, 2, 8, d), (s, 2, 1, d)]
        where = torch.stack([torch.arange(s).flip(0), torch.arange(s) // 2]).to(device) if ids else None
        options: dict[str, Any] = {"interleaved": interleaved, "inplace_backward": inplace, "position_ids": where}

        def reference(*tensors):
            rows = [t[:, None, None] if where is None else t[where.t()][:, :, None] for t in (cos, sin)]
            return tuple(fk.rope_reference(t, *rows, interleaved=interleaved) for t in tensors)

        if same:
            return (
                lambda x: fk.rope(x, x, cos, sin, **options),
                lambda x: reference(x, x),
                tensors_of(device, dtype, shapes[0]),
                gradients(device, shapes[0], shapes[0]),
            )
        return (
            lambda q, k: fk.rope(q, k, cos, sin, **options),
            reference,
            tensors_of(device, dtype, *shapes),
            gradients(device, *shapes),
        )

    return make


def _rope_one_gradient(s, dtype):
    """((q + k) w).sum() hands one tensor to both outputs as their gradient."""

    def make(device):
        cos, sin = (t.to(device) for t in fk.rope_tables(fk.rope_frequencies(128)[0], s))
        shape = (s, 2, 4, 128)
        return (
            lambda q, k: sum(fk.rope(q, k, cos, sin)),
            lambda q, k: sum(fk.rope_reference(t, cos[:, None, None], sin[:, None, None]) for t in (q, k)),
            tensors_of(device, dtype, shape, shape),
            gradients(device, shape),
        )

    return make


def _gated(n, f, dtype, weighted, split, ours=fk.swiglu, reference=fk.swiglu_reference, **options):
    def make(device):
        x = tensors_of(device, dtype, *((n, f),) * 2) if split else tensors_of(device, dtype, (n, 2 * f))
        weight = [seeded(n, seed=7).to(device)] if weighted else []
        count = len(x)

        def call(function):
            def run(*t):
                return function(*t[:count], weight=t[count] if weighted else None, **options)

            return run

        return call(ours), call(reference), [*x, *weight], gradients(device, (n, f))

    return make


def _tokens(n, h, k, dtype, spread):
    def make(device):
        chosen = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
        token, inverse = fk.token_order(chosen.to(device))
        ours, reference = (
            (fk.spread_tokens, fk.spread_reference) if spread else (fk.collect_tokens, fk.collect_reference)
        )
        given, out = ((n, h), (n * k, h)) if spread else ((n * k, h), (n, h))
        return (
            lambda x: ours(x, token, inverse),
            lambda x: reference(x, token, inverse),
            tensors_of(device, dtype, given),
            gradients(device, out),
        )

    return make


def _targets(n, vocab, device, strided=False, dtype=torch.int64):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(vocab, (n, 2), generator=generator, dtype=dtype).to(device)
    target[0] = -100
    return target[:, 0] if strided else target[:, 0].contiguous()


def _cross_entropy(n, v, dtype, inplace=False, strided=False, target_dtype=torch.int64, **options):
    def make(device):
        target = _targets(n, v, device, strided, target_dtype)
        return (
            lambda x: fk.cross_entropy(x * 1, target, reduction="none", inplace_backward=inplace, **options),
            lambda x: fk.cross_entropy_reference(x, target, **options),
            tensors_of(device, dtype, (n, v)),
            gradients(device, (n,)),
        )

    return make


def _linear_cross_entropy(n, h, v, dtype, strided=False, chunk=None, padding=0):
    def make(device):
        target = _targets(n, v - padding, device, strided)
        options = {"vocab_size": v - padding}
        x, w = tensors_of(device, dtype, (n, h), (v, h))
        return (
            lambda x, w: fk.fused_linear_cross_entropy(x, w, target, reduction="none", chunk_tokens=chunk, **options),
            lambda x, w: fk.linear_cross_entropy_reference(x, w, target, **options),
            [x, w * h**-0.5],
            gradients(device, (n,)),
        )

    return make


def operator_variants(tiny):
    def size(n):
        return max(8, n // 40) if tiny else n

    for dtype in (BF16, FP16):
        short = SHORT[dtype]
        for n, h in ((1000, 128), (333, 4096), (1000, 8192), (65, 12288), (7, 20000), (7, 40000)):
            yield Variant(f"layer_norm {n}x{h} {short}", _layer_norm((size(n), size(h)), dtype))
            for residual in (False, True):
                name = f"rms_norm{' residual' * residual} {n}x{h} {short}"
                yield Variant(name, _rms_norm((size(n), size(h)), dtype, "hf", residual))
        for interleaved in (False, True):
            for r in (128, 64):
                name = f"rope r{r}{' interleaved' * interleaved} {short}"
                yield Variant(name, _rope(size(333), dtype, r, interleaved=interleaved, inplace=True))
        for weighted in (False, True):
            for split in (False, True):
                name = f"swiglu{' weighted' * weighted}{' split' * split} {short}"
                yield Variant(name, _gated(size(333), size(5504), dtype, weighted, split))
        for approximate in ("tanh", "none"):
            of_gelu = {"ours": fk.geglu, "reference": fk.geglu_reference, "approximate": approximate}
            for weighted in (False, True):
                name = f"geglu {approximate}{' weighted' * weighted} {short}"
                yield Variant(name, _gated(size(333), size(5504), dtype, weighted, False, **of_gelu))
        for spread in (False, True):
            yield Variant(
                f"{'spread' if spread else 'collect'} tokens {short}", _tokens(size(333), size(4096), 8, dtype, spread)
            )
        options = {"label_smoothing": 0.1, "z_loss": 1e-4}
        yield Variant(f"cross_entropy {short}", _cross_entropy(size(333), size(32003), dtype, **options))
        yield Variant(
            f"cross_entropy in place {short}", _cross_entropy(size(333), size(32003), dtype, inplace=True, **options)
        )
        yield Variant(f"linear_cross_entropy {short}", _linear_cross_entropy(size(500), size(1024), 8192, dtype))
    for n, h in ((33, 16384), (9, 65536)):
        yield Variant(f"rms_norm residual {n}x{h} bf16", _rms_norm((size(n), size(h)), BF16, "hf", True))
    yield Variant("rms_norm megatron bf16", _rms_norm((size(333), size(4096)), BF16, "megatron", False))
    yield Variant("rms_norm residual megatron bf16", _rms_norm((size(333), size(4096)), BF16, "megatron", True))
    for rounding in ("hf", "megatron"):
        name = f"rms_norm of a weight from 1 {rounding} bf16"
        yield Variant(name, _rms_norm((size(333), size(4096)), BF16, rounding, False, offset=1.0))
    yield Variant("rms_norm residual fp32", _rms_norm((size(333), size(8192)), torch.float32, "hf", True))
    yield Variant("layer_norm fp32", _layer_norm((size(333), size(8192)), torch.float32))
    yield Variant("rope one tensor for q and k bf16", _rope(size(333), BF16, same=True))
    yield Variant("rope one gradient for q and k bf16", _rope_one_gradient(size(333), BF16))
    yield Variant("rope position ids bf16", _rope(size(333), BF16, ids=True))
    yield Variant("rope d80 bf16", _rope(size(333), BF16, r=80, d=80))
    n, v = size(333), size(50304)
    yield Variant("cross_entropy strided target bf16", _cross_entropy(n, v, BF16, strided=True))
    yield Variant("cross_entropy int32 target bf16", _cross_entropy(n, v, BF16, target_dtype=torch.int32))
    yield Variant(
        "linear_cross_entropy strided target, chunks, padding bf16",
        _linear_cross_entropy(size(500), size(1024), 8192, BF16, strided=True, chunk=128, padding=100),
    )
