import pytest
import torch
import triton
import triton.language as tl
from interpreter_fixes import OutOfBoundsError, bf16_bits_to_float, float_to_bf16_bits
from triton.runtime.errors import InterpreterError


@triton.jit
def _arithmetic(X, Y, OUT, SUM, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0.0)
    y = tl.load(Y + i, mask=i < n, other=0.0)
    tl.store(OUT + i, tl.where(x > y, x * y, x - y), mask=i < n)
    tl.store(SUM, tl.sum(x.to(tl.float32), axis=0))


@triton.jit
def _copy(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n), mask=i < n)


@triton.jit
def _matmul(A, B, C, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(C + tile, tl.dot(tl.load(A + tile), tl.load(B + tile)))


def test_bf16_arithmetic_equals_pytorch_bit_for_bit():
    x, y = torch.randn(2, 123, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, total = torch.empty_like(x), torch.empty(1)
    _arithmetic[(1,)](x, y, out, total, 123, BLOCK=128)
    assert torch.equal(out, torch.where(x > y, x * y, x - y))
    torch.testing.assert_close(total[0], x.float().sum())


def test_bf16_dot_accumulates_in_fp32():
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    c = torch.empty(32, 32)
    _matmul[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float())


def test_rounding_to_bf16_equals_pytorch_for_every_upper_half_and_for_ties():
    bits = (torch.arange(1 << 16, dtype=torch.int64) << 16)[:, None] + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001])
    values = bits.flatten().to(torch.int32).view(torch.float32)
    values = values[~values.isnan()]
    expected = values.bfloat16()
    got = float_to_bf16_bits(values.numpy())
    assert (got == expected.view(torch.uint16).numpy()).all()
    assert (bf16_bits_to_float(got) == expected.float().numpy()).all()


def test_a_load_past_the_end_of_a_tensor_raises():
    x, y = torch.arange(8.0), torch.empty(16)
    with pytest.raises(InterpreterError, match="load: 1 of 9 lanes") as raised:
        _copy[(1,)](x, y, 9, BLOCK=16)
    assert isinstance(raised.value.__cause__, OutOfBoundsError)


def test_a_store_past_the_end_of_a_view_raises_though_the_storage_goes_on():
    x, storage = torch.arange(16.0), torch.zeros(32)
    with pytest.raises(InterpreterError, match="store"):
        _copy[(1,)](x, storage[:8], 16, BLOCK=16)
    assert storage[8:].eq(0).all()
