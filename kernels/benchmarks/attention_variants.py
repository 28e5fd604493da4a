"""The variants of flash and piecewise attention."""

import sys

import torch
from variant import BF16, FP16, SHORT, Variant, gradients, tensors_of

import flagscale_kernels as fk

CHIPS = (80, 90)  # the chips that have lists of tiles


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
        grads = gradients(device, (2, heads, s, v or d), *[(2, heads, s)] * lse)
        return ours, reference, tensors_of(device, dtype, *shapes), grads

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

        return ours, reference, tensors_of(device, dtype, (s, 2, 4, 3, d)), gradients(device, (s, 2, 4, d))

    return make


def _packed(lengths, d, dtype, group=2, strided=False, key_lengths=None, window=None, causal=True, deterministic=True):
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
                max_seqlen_k=max(key_lengths), window=window, deterministic=deterministic,
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
        return ours, reference, tensors_of(device, dtype, *shapes), gradients(device, shapes[0])

    return make


def _piecewise(
    s, s_k, d, dtype, threshold, causal=True, group=2, layout="bnsd", deterministic=True, sinks=False, **options
):  # the options of the operator
    def make(device):
        def ours(*tensors):
            given = (_permuted(t, layout) for t in tensors[:5])
            out = fk.piecewise_attention(
                *given, threshold, causal=causal, layout=layout, deterministic=deterministic,
                sinks=tensors[5] if sinks else None, **options,
            )  # fmt: skip
            return _back(out, layout)

        def reference(*tensors):
            sink = tensors[5] if sinks else None
            return fk.piecewise_reference(*tensors[:5], threshold, causal=causal, sinks=sink, **options)

        q, k = (2, 4, s, d), (2, 4 // group, s_k, d)
        return ours, reference, tensors_of(device, dtype, q, k, q, k, k, *[(4,)] * sinks), gradients(device, q)

    return make


def _piecewise_packed(lengths, d, dtype, threshold):
    """Sequences of a pack, each against its own definition."""

    def make(device):
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)

        def ours(*tensors):
            return fk.piecewise_attention(
                *tensors, threshold, causal=True, layout="tnd", cu_seqlens_q=cu, cu_seqlens_k=cu,
                max_seqlen_q=max(lengths), max_seqlen_k=max(lengths),
            )  # fmt: skip

        def reference(*tensors):
            outputs = []
            for sequence in zip(*(t.split(lengths) for t in tensors)):
                views = [t.transpose(0, 1)[None] for t in sequence]
                outputs.append(fk.piecewise_reference(*views, threshold, causal=True)[0].transpose(0, 1))
            return torch.cat(outputs)

        q, k = (sum(lengths), 4, d), (sum(lengths), 2, d)
        return ours, reference, tensors_of(device, dtype, q, k, q, k, k), gradients(device, q)

    return make


def flash_variants(tiny):
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
    for d in (192, 256):  # on sm_90 a pass for dK and one for dV
        for label in ("full", "more queries", "window", "causal one KV head", "softcap, sinks, window"):
            rows, keys, options = shapes[label]
            yield Variant(f"flash {label} D{d} bf16", _flash(rows, keys, d, BF16, **options))
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
    yield Variant("flash packed D192 bf16", _packed(lengths, 192, BF16))
    yield Variant("flash packed D256 bf16", _packed(lengths, 256, BF16))
    yield Variant("flash packed full D128 bf16", _packed(lengths, 128, BF16, causal=False))
    yield Variant("flash packed window D128 bf16", _packed(lengths, 128, BF16, window=w))
    yield Variant("flash packed strided cu_seqlens D128 bf16", _packed(lengths, 128, BF16, strided=True))
    more_keys = [n + size(100) for n in lengths]
    yield Variant("flash packed more keys D128 bf16", _packed(lengths, 128, BF16, key_lengths=more_keys))


def piecewise_variants(tiny):
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
        "sinks D128": {"sinks": True},
        "not deterministic D128": {"deterministic": False},
        "sbnd D128": {"layout": "sbnd"},
        "bsnd D128": {"layout": "bsnd"},
    }.items():
        yield Variant(f"piecewise {name} bf16", _piecewise(s, s, 128, BF16, half, **options))
    yield Variant("piecewise fewer queries D128 bf16", _piecewise(size(333), s, 128, BF16, half))
    yield Variant("piecewise more queries D128 bf16", _piecewise(size(1300), s, 128, BF16, half))
    lengths = [size(n) for n in (333, 1, 777, 128)]
    yield Variant("piecewise packed D128 bf16", _piecewise_packed(lengths, 128, BF16, size(200)))
    yield Variant("piecewise D256 bf16", _piecewise(s, s, 256, BF16, half))
    yield Variant("piecewise D192 bf16", _piecewise(s, s, 192, BF16, half))
    yield Variant("piecewise D96 bf16", _piecewise(s, s, 96, BF16, half))
    yield Variant("piecewise D128 fp16", _piecewise(s, s, 128, FP16, half))


def longest_list(operator: str, widths: tuple[int, ...] = (64, 96, 128)) -> int:
    """The number of configs in the longest list of the operator's kernels; asks no driver."""
    module = sys.modules[f"flagscale_kernels.{operator}"]
    return max(len(kernel.configs(chip, d, 2)) for kernel in module.KERNELS for chip in CHIPS for d in widths)


def config_variants(tiny):
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
    for config in range(1, longest_list("flash_attention", (192, 256))):
        yield Variant(f"flash causal D256 bf16 config {config}", _flash(s, s, 256, BF16, causal=True), config)
        yield Variant(f"piecewise D256 bf16 config {config}", _piecewise(s, s, 256, BF16, s // 2), config)
    for config in range(1, longest_list("piecewise_attention")):
        for d in (64, 128):
            name = f"piecewise D{d} bf16 config {config}"
            yield Variant(name, _piecewise(s, s, d, BF16, s // 2, group=1), config)
            name = f"piecewise not deterministic D{d} bf16 config {config}"
            yield Variant(name, _piecewise(s, s, d, BF16, s // 2, group=1, deterministic=False), config)


def ordered_variants(tiny):
    """dQ added up in order: every mask, lengths that are no multiples of tiles, groups, packs, both operators."""

    def size(n):
        return max(8, n // 20) if tiny else n

    s, more, w = size(1008), size(1300), size(200)
    shapes = {
        "causal": (s, s, {"causal": True}),
        "causal one KV head": (s, s, {"causal": True, "group": 4}),
        "full": (s, s, {"causal": False, "group": 1}),
        "window": (more, s, {"causal": True, "window": w}),
        "window left and right": (s, more, {"causal": False, "window": (w, size(100))}),
        "long": (size(4096), size(4096), {"causal": True, "group": 1}),
    }
    for d in (128, 64):
        for label, (rows, keys, options) in shapes.items():
            yield Variant(f"ordered flash {label} D{d} bf16", _flash(rows, keys, d, BF16, **options), ordered=True)
    for d in (96, 256):
        yield Variant(f"ordered flash causal D{d} bf16", _flash(s, s, d, BF16, causal=True), ordered=True)
    lengths = [size(n) for n in (333, 1, 777, 128)]
    yield Variant("ordered flash packed D128 bf16", _packed(lengths, 128, BF16), ordered=True)
    yield Variant("ordered piecewise D128 bf16", _piecewise(s, s, 128, BF16, s // 2), ordered=True)
    yield Variant("not deterministic packed D128 bf16", _packed(lengths, 128, BF16, deterministic=False))


def hopper_variants(tiny):
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
