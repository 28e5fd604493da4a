from typing import Any

import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as_pytorch, seeded

from flagscale_kernels import (
    apply_rope,
    apply_rope_thd,
    packed_position_ids,
    rope,
    rope_frequencies,
    rope_reference,
    rope_tables,
)

LAYOUTS = ("sbnd", "bnsd", "bsnd", "tnd")


def tables(r, positions=64):
    return rope_tables(rope_frequencies(r)[0], positions)


def shape_of(layout, b, s, n, d):
    return tuple({"s": s, "b": b, "n": n, "d": d, "t": s}[letter] for letter in layout)


def expected(q, k, cos, sin, layout, interleaved, positions=None):
    """rope_reference on both, with the tables' rows put next to the tokens."""
    positions = torch.arange(q.shape[layout.index("t" if layout == "tnd" else "s")]) if positions is None else positions
    if cos.dim() == 3:
        rows = positions.expand(cos.shape[0], -1)
        cos, sin = (torch.stack([t[i][rows[i]] for i in range(t.shape[0])]) for t in (cos, sin))
    else:
        cos, sin = cos[positions], sin[positions]
    if layout == "tnd":
        cos, sin = cos[:, None], sin[:, None]
    else:
        cos, sin = (t if t.dim() == 3 else t[None] for t in (cos, sin))  # [b, s, r/2]
        cos, sin = (t[:, :, None].permute(*[{"b": 0, "s": 1, "n": 2, "d": 3}[c] for c in layout]) for t in (cos, sin))
    return tuple(rope_reference(t, cos, sin, interleaved=interleaved) for t in (q, k))


def check(backend, layout, interleaved, dtype, b=2, s=5, heads=(6, 2), d=16, r=16, inplace=True, positions=None):
    cos, sin = tables(r)
    q, k = (seeded(*shape_of(layout, b, s, n, d), dtype=dtype, seed=n) for n in heads)
    grads = [seeded(*shape_of(layout, b, s, n, d), seed=10 + n) for n in heads]
    assert_as_good_as_pytorch(
        lambda q, k: rope(
            q, k, cos, sin, layout=layout, interleaved=interleaved, position_ids=positions,
            inplace_backward=inplace, backend=None if q.dtype == torch.float64 else backend,
        ),
        lambda q, k: expected(q, k, cos, sin, layout, interleaved, positions),
        [q, k],
        grads,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_as_good_as_pytorch(backend, layout, interleaved, dtype):
    check(backend, layout, interleaved, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "r"), [(16, 6), (20, 20), (123, 10), (128, 64), (5, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_and_odd_rotary_dimensions(backend, d, r, interleaved):
    check(backend, "sbnd", interleaved, torch.bfloat16, s=3, heads=(5, 1), d=d, r=r, inplace=False)
    check(backend, "bnsd", interleaved, torch.float32, s=3, heads=(3, 3), d=d, r=r, inplace=True)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_position_ids_choose_the_rows_of_the_tables(backend, shape):
    positions = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(0))
    check(backend, "bnsd", False, torch.float32, positions=positions)
    check(backend, "sbnd", True, torch.float32, positions=positions.int())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_for_each_batch_entry(backend):
    cos, sin = (torch.stack([t, t.flip(0)]) for t in tables(16))
    q, k = seeded(2, 3, 5, 16), seeded(2, 1, 5, 16, seed=1)
    got = rope(q, k, cos, sin, layout="bnsd", backend=backend)
    for mine, exact in zip(got, expected(q, k, cos, sin, "bnsd", False)):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_start_again_at_position_zero(backend):
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    assert packed_position_ids(cu_seqlens, 8).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    cos, sin = tables(16)
    q, k = seeded(8, 4, 16), seeded(8, 2, 16, seed=1)
    got = rope(q, k, cos, sin, layout="tnd", cu_seqlens=cu_seqlens, backend=backend)
    for start, end in ((0, 3), (3, 8)):
        alone = expected(q[start:end], k[start:end], cos, sin, "tnd", False)
        for mine, exact in zip(got, alone):
            torch.testing.assert_close(mine[start:end], exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_a_packed_projection_need_no_copy(backend):
    qkv = seeded(5, 2, 2, 4 * 16)  # [s, b, groups, (2 q heads + k + v) * d]
    q, k = qkv[..., :32].unflatten(-1, (2, 16))[:, :, 0], qkv[..., 32:48]
    got = rope(q, k, *tables(16), backend=backend)
    for mine, exact in zip(got, expected(q, k, *tables(16), "sbnd", False)):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_writes_over_the_gradient_only_when_told_to(backend):
    q, k = seeded(5, 1, 2, 16).requires_grad_(), seeded(5, 1, 1, 16, seed=1).requires_grad_()
    for inplace in (False, True):
        grads = [seeded(5, 1, 2, 16, seed=2), seeded(5, 1, 1, 16, seed=3)]
        before = [g.clone() for g in grads]
        out = rope(q, k, *tables(16), inplace_backward=inplace, backend=backend)
        dq, _ = torch.autograd.grad(out, [q, k], grads)
        assert torch.equal(grads[0], before[0]) != inplace
        assert (dq.data_ptr() == grads[0].data_ptr()) == inplace
        torch.testing.assert_close(dq.norm(), before[0].norm())
        assert torch.equal(grads[1], before[1]) != inplace
    expanded = torch.ones(()).expand(5, 1, 2, 16)  # every element shares its memory: never written over
    out = rope(q, k, *tables(16), inplace_backward=True, backend=backend)
    torch.autograd.grad(out[0], q, expanded)
    assert expanded.eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_for_q_and_k_and_one_gradient_for_both(backend):
    a, b, w = seeded(5, 1, 2, 16), seeded(5, 1, 2, 16, seed=1), seeded(5, 1, 2, 16, seed=2)

    def gradients(tensors, rotate):
        leaves = [t.clone().requires_grad_() for t in tensors]
        q, k = rotate(leaves[0], leaves[-1])
        return torch.autograd.grad(((q + k) * w).sum(), leaves)

    for tensors in ([a], [a, b]):
        wanted = gradients(tensors, lambda q, k: expected(q, k, *tables(16), "sbnd", False))
        for inplace in (False, True):
            options: dict[str, Any] = {"inplace_backward": inplace, "backend": backend}
            got = gradients(tensors, lambda q, k: rope(q, k, *tables(16), **options))  # noqa: B023
            torch.testing.assert_close(got, wanted)
    for mine, exact in zip(rope(a, a, *tables(16), backend=backend), expected(a, a, *tables(16), "sbnd", False)):
        torch.testing.assert_close(mine, exact)


class Group:
    """Stands for a context-parallel group seen from one of its ranks."""

    def __init__(self, rank, size):
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_with_megatron_angles_equals_megatron_core(backend, interleaved):
    from megatron.core.models.common.embeddings import apply_rotary_pos_emb
    from megatron.core.transformer import TransformerConfig

    angles = torch.outer(torch.arange(5.0), rope_frequencies(12)[0])
    freqs = torch.stack((angles, angles), -1).flatten(1) if interleaved else torch.cat((angles, angles), -1)
    freqs = freqs[:, None, None]  # [s, 1, 1, r]
    t = seeded(5, 2, 3, 16)
    got = apply_rope(t, freqs, interleaved=interleaved, mscale=1.1, backend=backend)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, rotary_interleaved=interleaved)
    theirs = apply_rotary_pos_emb(t, freqs, config, mscale=1.1, cp_group=Group(0, 1))
    torch.testing.assert_close(got, theirs)


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pack_with_megatron_angles_equals_megatron_core(backend, cp_size):
    from megatron.core.models.common.embeddings import apply_rotary_pos_emb
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    angles = torch.outer(torch.arange(20.0), rope_frequencies(16)[0])
    freqs = torch.cat((angles, angles), -1)[:, None, None]
    cu_seqlens = torch.tensor([0, 4, 12], dtype=torch.int32)
    for rank in range(cp_size):
        t = seeded(12 // cp_size, 3, 16, seed=rank)
        got = apply_rope_thd(t, cu_seqlens, freqs, cp_size, rank, backend=backend)
        theirs = apply_rotary_pos_emb(t, freqs, config, cu_seqlens, cp_group=Group(rank, cp_size))
        torch.testing.assert_close(got, theirs)


@pytest.mark.parametrize(
    ("scaling", "parameters", "seq_len"),
    [
        ("linear", {"factor": 4.0}, None),
        ("dynamic", {"factor": 2.0}, None),
        ("dynamic", {"factor": 2.0}, 9000),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 4096}, None),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False}, None),
        (
            "yarn",
            {
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 16.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
            None,
        ),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            None,
        ),
    ],
)
@pytest.mark.parametrize(("head_dim", "base"), [(64, 10000.0), (128, 500000.0)])
def test_scaled_frequencies_equal_transformers(scaling, parameters, seq_len, head_dim, base):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": scaling, "rope_theta": base, **parameters},
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"), seq_len=seq_len)
    numbers = dict(parameters)
    original = numbers.pop("original_max_position_embeddings", 4096)
    ours, our_factor = rope_frequencies(
        head_dim, base, scaling, original_max_positions=original, seq_len=seq_len, **numbers
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(their_factor, rel=1e-6)


def test_unscaled_frequencies_and_tables_equal_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=4))
    cos, sin = rotary(torch.empty(1), torch.arange(9)[None])
    ours = tables(64, 9)
    torch.testing.assert_close(ours[0], cos[0, :, :32])
    torch.testing.assert_close(ours[1], sin[0, :, :32])


def test_ntk_keeps_the_fastest_frequency_and_divides_the_slowest_by_the_factor():
    plain, scaled = rope_frequencies(64)[0], rope_frequencies(64, scaling="ntk", factor=4.0)[0]
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 4)


def test_cpu_path_passes_gradcheck():
    cos, sin = (t.double() for t in tables(4))
    q, k = seeded(2, 1, 2, 6, dtype=torch.float64), seeded(2, 1, 1, 6, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), [q.requires_grad_(), k.requires_grad_()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(5, 2, 1, 8)}, r"k.shape\[-1\] \(8\) must equal q.shape\[-1\] \(16\)"),
        ({"k": torch.ones(4, 2, 1, 16)}, r"k's \(batch, sequence\) \(2, 4\) must equal q's \(2, 5\)"),
        ({"k": torch.ones(5, 2, 1, 16).half()}, "k.dtype"),
        ({"q": torch.ones(5, 2, 16)}, r"q.dim\(\) \(3\) must be 4"),
        ({"q": torch.ones(5, 2, 16, 2).transpose(2, 3)}, r"q.stride\(-1\)"),
        ({"layout": "nsbd"}, "layout"),
        ({"cos": torch.ones(5, 9), "sin": torch.ones(5, 9)}, r"rotary dimension.* head dimension \(16\)"),
        ({"cos": torch.ones(4, 8), "sin": torch.ones(4, 8)}, r"cos.shape\[-2\] \(4\).* sequence length \(5\)"),
        ({"sin": torch.ones(5, 4)}, "sin.shape"),
        ({"position_ids": torch.ones(2, 4, dtype=torch.int64)}, r"position_ids.shape \(\(2, 4\)\)"),
        ({"position_ids": torch.ones(5)}, "position_ids.dtype"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens needs layout 'tnd'"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    arguments = {
        "q": torch.ones(5, 2, 4, 16),
        "k": torch.ones(5, 2, 1, 16),
        "cos": torch.ones(5, 8),
        "sin": torch.ones(5, 8),
    }
    with pytest.raises(ValueError, match=message):
        rope(**(arguments | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 7}, r"dim \(7\)"),
        ({"dim": 8, "scaling": "cubic"}, "scaling"),
        ({"dim": 8, "scaling": "yarn", "factor": 2.0}, "original_max_positions"),
        ({"dim": 8, "scaling": "linear", "factor": 0.0}, "factor"),
    ],
)
def test_bad_frequencies_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        rope_frequencies(**arguments)
