"""Every variant of every operator, with a definition in plain PyTorch to compare it with.

`run.py` checks them before it measures, tests/kernels/test_gpu.py tests them on a GPU, and tests/kernels/test_benchmarks.py
runs them at tiny sizes on the CPU. The GPU is asked for nothing here: inputs are made when a variant is checked.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accuracy import assert_as_good_as_pytorch, seeded

import flagscale_kernels as fk
from flagscale_kernels._rivals import ALWAYS, NEVER, RIVALS_VARIABLE
from flagscale_kernels._tuning import AUTOTUNE_VARIABLE, TunedKernel

FP16, BF16 = torch.float16, torch.bfloat16
SHORT = {FP16: "fp16", BF16: "bf16", torch.float32: "fp32"}
CHIPS = (80, 90)  # the chips that have lists of tiles


@dataclass(frozen=True)
class Variant:
    """An operator with its options. `make(device)` returns (ours, reference, inputs, gradients of the outputs).

    `config` is the place in every kernel's list of tiles to compute with; None takes the first, which is the default.
    `rival` computes with the kernels for one kind of chip, where they take the call (`_rivals.py`).
    """

    name: str
    make: Callable
    config: int | None = None
    rival: bool = False

    def check(self, device: str) -> None:
        """Raise AssertionError unless outputs and gradients are as good as PyTorch's in the same precision."""
        ours, reference, inputs, grads = self.make(device)
        with one_config(self.config), _variable(RIVALS_VARIABLE, ALWAYS if self.rival else NEVER):
            assert_as_good_as_pytorch(ours, reference, inputs, grads)


@contextlib.contextmanager
def one_config(place: int | None) -> Iterator[None]:
    """Within this context every attention kernel computes with the config at `place` of its list, or with the default.

    Where a kernel's list is shorter, its last config computes.
    """
    stock = TunedKernel.launch

    def launch(self, *args, **options):
        lists = self.configs
        self.configs = lambda *key: [lists(*key)[: (place or 0) + 1][-1]]
        try:
            stock(self, *args, **options)
        finally:
            self.configs = lists

    TunedKernel.launch = launch
    try:
        with _variable(AUTOTUNE_VARIABLE, "0"):
            yield
    finally:
        TunedKernel.launch = stock


@contextlib.contextmanager
def _variable(name, value):
    """Within this context the environment variable has the value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _tensors(device, dtype, *shapes):
    return [seeded(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes)]


def _gradients(device, *shapes):
    return [seeded(*shape, seed=90 + i).to(device) for i, shape in enumerate(shapes)]


# ----------------------------------------------------------------------------------------------- the smaller operators


def _rms_norm(shape, dtype, rounding, residual, offset=0.0):
    options = {"rounding": rounding, "weight_offset": offset}

    def make(device):
        inputs = _tensors(device, dtype, *(shape,) * (1 + residual), shape[-1:])
        if not residual:
            return (
                lambda x, w: fk.rms_norm(x, w, **options),
                lambda x, w: fk.rms_norm_reference(x, w, **options),
                inputs,
                _gradients(device, shape),
            )
        return (
            lambda x, r, w: fk.rms_norm_residual(x, r, w, **options),
            lambda x, r, w: (fk.rms_norm_reference(x + r, w, **options), x + r),
            inputs,
            _gradients(device, shape, shape),
        )

    return make


def _layer_norm(shape, dtype):
    def make(device):
        inputs = _tensors(device, dtype, shape, shape[-1:], shape[-1:])
        return fk.layer_norm, fk.layer_norm_reference, inputs, _gradients(device, shape)

    return make


def _rope(s, dtype, r=128, d=128, interleaved=False, inplace=False, same=False, ids=False):
    def make(device):
        cos, sin = (t.to(device) for t in fk.rope_tables(fk.rope_frequencies(r)[0], s))
        shapes = [(s, 2, 8, d), (s, 2, 1, d)]
        where = torch.stack([torch.arange(s).flip(0), torch.arange(s) // 2]).to(device) if ids else None
        options = {"interleaved": interleaved, "inplace_backward": inplace, "position_ids": where}

        def reference(*tensors):
            rows = [t[:, None, None] if where is None else t[where.t()][:, :, None] for t in (cos, sin)]
            return tuple(fk.rope_reference(t, *rows, interleaved=interleaved) for t in tensors)

        if same:
            return (
                lambda x: fk.rope(x, x, cos, sin, **options),
                lambda x: reference(x, x),
                _tensors(device, dtype, shapes[0]),
                _gradients(device, shapes[0], shapes[0]),
            )
        return (
            lambda q, k: fk.rope(q, k, cos, sin, **options),
            reference,
            _tensors(device, dtype, *shapes),
            _gradients(device, *shapes),
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
            _tensors(device, dtype, shape, shape),
            _gradients(device, shape),
        )

    return make


def _gated(n, f, dtype, weighted, split, ours=fk.swiglu, reference=fk.swiglu_reference, **options):
    def make(device):
        x = _tensors(device, dtype, *((n, f),) * 2) if split else _tensors(device, dtype, (n, 2 * f))
        weight = [seeded(n, seed=7).to(device)] if weighted else []
        count = len(x)

        def call(function):
            def run(*t):
                return function(*t[:count], weight=t[count] if weighted else None, **options)

            return run

        return call(ours), call(reference), [*x, *weight], _gradients(device, (n, f))

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
            _tensors(device, dtype, given),
            _gradients(device, out),
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
            _tensors(device, dtype, (n, v)),
            _gradients(device, (n,)),
        )

    return make


def _linear_cross_entropy(n, h, v, dtype, strided=False, chunk=None, padding=0):
    def make(device):
        target = _targets(n, v - padding, device, strided)
        options = {"vocab_size": v - padding}
        x, w = _tensors(device, dtype, (n, h), (v, h))
        return (
            lambda x, w: fk.fused_linear_cross_entropy(x, w, target, reduction="none", chunk_tokens=chunk, **options),
            lambda x, w: fk.linear_cross_entropy_reference(x, w, target, **options),
            [x, w * h**-0.5],
            _gradients(device, (n,)),
        )

    return make


# ----------------------------------------------------------------------------------------------------------- attention


def _permuted(t, layout):
    """[b, n, s, d] in the order of `layout`, in memory too."""
    order = {"bnsd": (0, 1, 2, 3), "sbnd": (2, 0, 1, 3), "bsnd": (0, 2, 1, 3)}[layout]
    return t.permute(order).contiguous()


def _back(t, layout):
    return t.permute({"bnsd": (0, 1, 2, 3), "sbnd": (1, 2, 0, 3), "bsnd": (0, 2, 1, 3)}[layout])


def _flash(
    s, s_k, d, dtype, group=2, layout="bnsd", lse=True, alibi=False, v=None, sinks=False, deterministic=True, **options
):  # fmt: skip
    """Keys and values of d and v columns; `sinks` are an input with a gradient."""
    heads, kv_heads = 4, 4 // group

    def make(device):
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device) if alibi else None

        def ours(q, k, v, sink=None):
            q, k, v = (_permuted(t, layout) for t in (q, k, v))
            out = fk.flash_attention(
                q, k, v, layout=layout, alibi_slopes=slopes, sinks=sink, return_lse=lse, deterministic=deterministic,
                **options,
            )  # fmt: skip
            return (_back(out[0], layout), out[1]) if lse else _back(out, layout)

        def reference(q, k, v, sink=None):
            out = fk.attention_reference(q, k, v, alibi_slopes=slopes, sinks=sink, **options)
            return out if lse else out[0]

        shapes = ((2, heads, s, d), (2, kv_heads, s_k, d), (2, kv_heads, s_k, v or d), *[(heads,)] * sinks)
        grads = _gradients(device, (2, heads, s, v or d), *[(2, heads, s)] * lse)
        return ours, reference, _tensors(device, dtype, *shapes), grads

    return make


def _fused_projection(s, d, dtype):
    """q, k and v as slices of one [s, b, heads, 3, d] projection: megatron-core's strides."""

    def make(device):
        def ours(x):
            q, k, v = x.unbind(3)
            return fk.flash_attention(q, k, v, causal=True, layout="sbnd")

        def reference(x):
            q, k, v = (t.permute(1, 2, 0, 3) for t in x.unbind(3))
            return fk.attention_reference(q, k, v, causal=True)[0].permute(2, 0, 1, 3)

        return ours, reference, _tensors(device, dtype, (s, 2, 4, 3, d)), _gradients(device, (s, 2, 4, d))

    return make


def _packed(lengths, d, dtype, group=2, strided=False, key_lengths=None, window=None, causal=True):
    """Sequences of a pack, each against its own definition. `strided`: cu_seqlens is a column of a table."""
    key_lengths = key_lengths or lengths
    heads, kv_heads = 4, 4 // group

    def make(device):
        def starts(lengths):
            cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            table = torch.stack((cu, cu * 0), 1).to(device)
            return table[:, 0] if strided else table[:, 0].contiguous()

        cu_q, cu_k = starts(lengths), starts(key_lengths)

        def ours(q, k, v):
            return fk.flash_attention(
                q, k, v, causal=causal, layout="tnd", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max(lengths),
                max_seqlen_k=max(key_lengths), window=window,
            )  # fmt: skip

        def reference(q, k, v):
            parts = [q.split(lengths), *(t.split(key_lengths) for t in (k, v))]
            outputs = []
            for sequence in zip(*parts):
                views = [t.transpose(0, 1)[None] for t in sequence]
                outputs.append(fk.attention_reference(*views, causal=causal, window=window)[0][0].transpose(0, 1))
            return torch.cat(outputs)

        n, n_k = sum(lengths), sum(key_lengths)
        shapes = ((n, heads, d), (n_k, kv_heads, d), (n_k, kv_heads, d))
        return ours, reference, _tensors(device, dtype, *shapes), _gradients(device, shapes[0])

    return make


def _piecewise(s, s_k, d, dtype, threshold, causal=True, group=2, layout="bnsd", deterministic=True, **options):
    def make(device):
        def ours(*tensors):
            given = (_permuted(t, layout) for t in tensors)
            out = fk.piecewise_attention(
                *given, threshold, causal=causal, layout=layout, deterministic=deterministic, **options
            )
            return _back(out, layout)

        q, k = (2, 4, s, d), (2, 4 // group, s_k, d)
        return (
            ours,
            lambda *t: fk.piecewise_reference(*t, threshold, causal=causal, **options),
            _tensors(device, dtype, q, k, q, k, k),
            _gradients(device, q),
        )

    return make


# ------------------------------------------------------------------------------------------------------------ the list


def _small_operators(tiny):
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


def _flash_variants(tiny):
    def size(n):
        return max(8, n // 20) if tiny else n

    s, more, w = size(1008), size(1300), size(200)
    causal = {"causal": True}
    shapes = {
        "causal": (s, s, causal),
        "causal MHA": (s, s, causal | {"group": 1}),
        "causal one KV head": (s, s, causal | {"group": 4}),
        "full": (s, s, {"causal": False}),
        "fewer queries": (size(333), s, causal),
        "more queries": (more, s, causal),
        "more queries full": (more, size(333), {"causal": False}),
        "window": (s, s, causal | {"window": w}),
        "window left and right": (s, s, {"causal": False, "window": (w, size(100))}),
        "window left only": (more, s, {"causal": False, "window": (w, -1)}),
        "window more queries": (more, s, causal | {"window": w}),
        "window near 2^31": (s, s, {"causal": False, "window": (2**31 - 1, 2**31 - 1)}),
        "ALiBi": (s, s, causal | {"alibi": True}),
        "ALiBi full": (s, s, {"causal": False, "alibi": True}),
        "sbnd": (s, s, causal | {"layout": "sbnd"}),
        "bsnd": (s, s, causal | {"layout": "bsnd"}),
        "softcap": (s, s, causal | {"softcap": 2.0}),
        "sinks": (s, s, causal | {"sinks": True}),
        "softcap, sinks, window": (s, s, causal | {"softcap": 2.0, "sinks": True, "window": w}),
        "not deterministic": (s, s, causal | {"deterministic": False}),
        "not deterministic, more queries": (more, s, causal | {"deterministic": False, "group": 4}),
        "sbnd window": (s, s, causal | {"layout": "sbnd", "window": w}),
    }
    for d in (64, 128):
        for label, (rows, keys, options) in shapes.items():
            yield Variant(f"flash {label} D{d} bf16", _flash(rows, keys, d, BF16, **options))
    for d, v in ((192, 128), (96, 64), (64, 128)):
        yield Variant(f"flash causal D{d} V{v} bf16", _flash(s, s, d, BF16, v=v, **causal))
        yield Variant(
            f"flash not deterministic D{d} V{v} bf16", _flash(s, s, d, BF16, v=v, deterministic=False, **causal)
        )
    for d in (16, 32, 72, 80, 96, 192, 256):
        yield Variant(f"flash causal D{d} bf16", _flash(s, s, d, BF16, **causal))
    for d in (64, 128):
        for label in ("causal", "full", "window"):
            rows, keys, options = shapes[label]
            yield Variant(f"flash {label} D{d} fp16", _flash(rows, keys, d, FP16, **options))
    yield Variant("flash causal D64 fp32", _flash(size(333), size(333), 64, torch.float32, **causal))
    yield Variant("flash causal without LSE D128 bf16", _flash(s, s, 128, BF16, lse=False, **causal))
    yield Variant("flash fused projection D128 bf16", _fused_projection(s, 128, BF16))
    lengths = [size(n) for n in (333, 1, 777, 128)]
    yield Variant("flash packed D128 bf16", _packed(lengths, 128, BF16))
    yield Variant("flash packed D64 bf16", _packed(lengths, 64, BF16))
    yield Variant("flash packed full D128 bf16", _packed(lengths, 128, BF16, causal=False))
    yield Variant("flash packed window D128 bf16", _packed(lengths, 128, BF16, window=w))
    yield Variant("flash packed strided cu_seqlens D128 bf16", _packed(lengths, 128, BF16, strided=True))
    more_keys = [n + size(100) for n in lengths]
    yield Variant("flash packed more keys D128 bf16", _packed(lengths, 128, BF16, key_lengths=more_keys))


def _piecewise_variants(tiny):
    def size(n):
        return max(8, n // 20) if tiny else n

    s = size(1008)
    for d in (64, 128):
        for threshold in (0, 1, size(333), size(500), 5000):
            name = f"piecewise threshold {threshold} D{d} bf16"
            yield Variant(name, _piecewise(s, s, d, BF16, threshold))
    half = s // 2
    for name, options in {
        "full D128": {"causal": False},
        "MHA D128": {"group": 1},
        "softcap D128": {"softcap": 2.0},
        "not deterministic D128": {"deterministic": False},
        "sbnd D128": {"layout": "sbnd"},
        "bsnd D128": {"layout": "bsnd"},
    }.items():
        yield Variant(f"piecewise {name} bf16", _piecewise(s, s, 128, BF16, half, **options))
    yield Variant("piecewise fewer queries D128 bf16", _piecewise(size(333), s, 128, BF16, half))
    yield Variant("piecewise more queries D128 bf16", _piecewise(size(1300), s, 128, BF16, half))
    yield Variant("piecewise D256 bf16", _piecewise(s, s, 256, BF16, half))
    yield Variant("piecewise D96 bf16", _piecewise(s, s, 96, BF16, half))
    yield Variant("piecewise D128 fp16", _piecewise(s, s, 128, FP16, half))


def longest_list(operator: str) -> int:
    """The number of configs in the longest list of the operator's kernels; asks no driver."""
    module = sys.modules[f"flagscale_kernels.{operator}"]
    return max(len(kernel.configs(chip, d, 2)) for kernel in module.KERNELS for chip in CHIPS for d in (64, 96, 128))


def _config_variants(tiny):
    """The configs of the lists after the default, on the variants that differ in code."""

    def size(n):
        return max(8, n // 20) if tiny else n

    s, w = size(1008), size(200)
    for config in range(1, longest_list("flash_attention")):
        for d in (64, 128):
            label = f"D{d} bf16 config {config}"
            # One query head for each KV head, as in the benchmarks: the defaults are tested with two.
            yield Variant(f"flash causal {label}", _flash(s, s, d, BF16, causal=True, group=1), config)
            yield Variant(f"flash full {label}", _flash(s, s, d, BF16, causal=False, group=1), config)
            yield Variant(f"flash window {label}", _flash(s, s, d, BF16, causal=True, window=w), config)
            options = {"causal": True, "deterministic": False, "group": 1}
            yield Variant(f"flash not deterministic {label}", _flash(s, s, d, BF16, **options), config)
        label = f"D128 bf16 config {config}"
        yield Variant(f"flash ALiBi {label}", _flash(s, s, 128, BF16, causal=True, alibi=True), config)
        yield Variant(f"flash packed {label}", _packed([size(n) for n in (333, 1, 777)], 128, BF16), config)
        yield Variant(f"flash causal D96 bf16 config {config}", _flash(s, s, 96, BF16, causal=True), config)
    for config in range(1, longest_list("piecewise_attention")):
        for d in (64, 128):
            name = f"piecewise D{d} bf16 config {config}"
            yield Variant(name, _piecewise(s, s, d, BF16, s // 2, group=1), config)
            name = f"piecewise not deterministic D{d} bf16 config {config}"
            yield Variant(name, _piecewise(s, s, d, BF16, s // 2, group=1, deterministic=False), config)


def _rival_variants(tiny):
    """What the kernels for Hopper take, at lengths that are and are not multiples of their tiles."""

    def size(n):
        return max(8, n // 20) if tiny else n

    for d in (64, 128):
        for dtype in (BF16, FP16):
            yield Variant(
                f"hopper flash causal D{d} {SHORT[dtype]}",
                _flash(size(1024), size(1024), d, dtype, causal=True),
                None,
                True,
            )
        shapes = {
            "odd lengths": (size(1000), size(1000), {"causal": True, "group": 1}),
            "full": (size(1024), size(1024), {"causal": False}),
            "full, odd lengths": (size(777), size(1111), {"causal": False}),
            "fewer queries": (size(333), size(1300), {"causal": True}),
            "more queries": (size(1300), size(333), {"causal": True}),
            "short": (size(100), size(100), {"causal": True, "group": 4}),
            "sbnd": (size(1024), size(1024), {"causal": True, "layout": "sbnd"}),
            "bsnd": (size(1024), size(1024), {"causal": True, "layout": "bsnd"}),
            "long": (size(4096), size(4096), {"causal": True}),
        }
        for label, (rows, keys, options) in shapes.items():
            yield Variant(f"hopper flash {label} D{d} bf16", _flash(rows, keys, d, BF16, **options), None, True)


def variants(tiny: bool = False) -> list[Variant]:
    """All variants, or the same ones with a few rows for the CPU. Defaults come before other configs."""
    found = [*_flash_variants(tiny), *_small_operators(tiny), *_piecewise_variants(tiny), *_config_variants(tiny)]
    found += _rival_variants(tiny)
    names = [variant.name for variant in found]
    assert len(set(names)) == len(names), "two variants have the same name"
    return found
