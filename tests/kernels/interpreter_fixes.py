"""Triton's interpreter, made right for bf16 and strict about memory.

The stock interpreter (Triton 3.6 to 3.9) has four gaps that matter to these tests:

* bf16 values are uint16 bit patterns, and arithmetic on them is integer arithmetic; casts from fp32 truncate.
* A load or store that leaves its tensor reads or writes whatever memory is there, silently.
* Every call of a device function patches triton.language again, which is most of the run time.
* Sums and products of integers are computed again in 64 bits, for an assertion that is off: half of the rest.

`install()` closes all four. It changes classes of triton.runtime.interpreter in this process, so only tests call it,
after TRITON_INTERPRET=1 has been set and before the first launch.
"""

from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as interp

BF16, FP32 = tl.bfloat16, tl.float32
Handle, Builder = interp.TensorHandle, interp.InterpreterBuilder


class OutOfBoundsError(IndexError):
    """A lane of a load, store or atomic lies outside every tensor given to the kernel."""


# --------------------------------------------------------------------------------------------------------------- bf16


def bf16_bits_to_float(bits):
    """uint16 bit patterns -> float32, exact, subnormals included."""
    return np.left_shift(bits.astype(np.uint32), 16).view(np.float32)


def float_to_bf16_bits(x):
    """float32 -> bf16 bit patterns, rounded to nearest even as the hardware does; NaN stays NaN."""
    x = np.ascontiguousarray(x, np.float32)
    u = x.view(np.uint32)
    rounded = ((u + (np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(handle):
    return handle.dtype.scalar == BF16


def _widen(handle):
    return Handle(bf16_bits_to_float(handle.data), FP32) if _is_bf16(handle) else handle


def _narrow(handle):
    # A comparison of two bf16 blocks yields booleans, which stay as they are.
    return handle if handle.data.dtype == np.bool_ else Handle(float_to_bf16_bits(handle.data), BF16)


def _with_bf16(original, num_operands):
    """Wrap a builder method: bf16 operands are computed in fp32 and the result rounded back."""

    def method(self, *args):
        operands, rest = args[:num_operands], args[num_operands:]
        if any(_is_bf16(o) for o in operands):
            return _narrow(original(self, *[_widen(o) for o in operands], *rest))
        return original(self, *args)

    return method


def _install_bf16():
    stock_cast, stock_fp_to_fp, stock_dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot
    stock_rmw, stock_apply = Builder.create_atomic_rmw, interp.ReduceScanOpInterface.apply

    def cast(self, src, dst_type):
        if _is_bf16(src) and dst_type.scalar != BF16:
            wide = _widen(src)
            return wide if dst_type.scalar == FP32 else stock_cast(self, wide, dst_type)
        if dst_type.scalar == BF16 and not _is_bf16(src):
            return Handle(float_to_bf16_bits(src.data.astype(np.float32)), BF16)
        return stock_cast(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bf16(src) or dst_type.scalar == BF16:
            return cast(self, src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode)

    def select(self, condition, lhs, rhs):
        return Handle(np.where(condition.data, lhs.data, rhs.data), rhs.dtype.scalar)  # moves bits, computes nothing

    def dot(self, a, b, acc, *rest):
        return stock_dot(self, _widen(a), _widen(b), acc, *rest)

    def rmw(self, op, ptr, val, *rest):
        if _is_bf16(val):
            raise NotImplementedError("bf16 atomics: accumulate in fp32")
        return stock_rmw(self, op, ptr, val, *rest)

    def retyped(t, dtype, convert):
        block = tl.block_type(dtype, list(t.shape)) if t.type.is_block() else dtype
        return tl.core.tensor(Handle(convert(t.handle.data), dtype), block)

    def apply(self, inputs):
        if not isinstance(inputs, tuple) or not any(t.dtype == BF16 for t in inputs):
            return stock_apply(self, inputs)
        wide = tuple(retyped(t, FP32, bf16_bits_to_float) if t.dtype == BF16 else t for t in inputs)
        return tuple(retyped(r, BF16, float_to_bf16_bits) if r.dtype == FP32 else r for r in stock_apply(self, wide))

    Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = cast, fp_to_fp, dot
    Builder.create_select, Builder.create_atomic_rmw = select, rmw
    Builder.binary_op = _with_bf16(Builder.binary_op, 2)
    Builder.unary_op = _with_bf16(Builder.unary_op, 1)
    Builder.ternary_op = _with_bf16(Builder.ternary_op, 3)
    Builder.create_fma = _with_bf16(Builder.create_fma, 3)
    interp.ReduceScanOpInterface.apply = apply


# ------------------------------------------------------------------------------------------------------------- bounds

_ranges = []  # [(first byte, one past the last byte)] of every tensor argument of the running launch


def _remember_extents(argument):
    if not isinstance(argument, torch.Tensor):
        argument = getattr(argument, "base", argument)  # a TensorDescriptor or a TensorWrapper
    if isinstance(argument, torch.Tensor):
        if argument.numel():
            # The extent of the view, not of its storage: a slice of a larger buffer must not be left either.
            last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride()))
            start = argument.data_ptr()
            _ranges.append((start, start + (last + 1) * argument.element_size()))
    elif isinstance(argument, tuple | list):
        for item in argument:
            _remember_extents(item)


def _check(ptrs, mask, what):
    addresses = ptrs.data
    if mask is not None:
        shape = np.broadcast_shapes(addresses.shape, mask.data.shape)
        addresses = np.broadcast_to(addresses, shape)[np.broadcast_to(mask.data, shape)]
    if addresses.size == 0:
        return
    element_bytes = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    first, last = int(addresses.min()), int(addresses.max()) + element_bytes
    if any(start <= first and last <= end for start, end in _ranges):
        return
    inside = np.zeros(addresses.shape, bool)
    for start, end in _ranges:
        inside |= (addresses >= start) & (addresses + element_bytes <= end)
    if not inside.all():
        outside = int((~inside).sum())
        raise OutOfBoundsError(f"{what}: {outside} of {addresses.size} lanes lie outside every tensor argument")


def _install_bounds():
    stock_load, stock_store = Builder.create_masked_load, Builder.create_masked_store
    stock_rmw, stock_init = Builder.create_atomic_rmw, interp.GridExecutor._init_args_hst

    def load(self, ptrs, mask, *rest, **kwargs):
        _check(ptrs, mask, "load")
        return stock_load(self, ptrs, mask, *rest, **kwargs)

    def store(self, ptrs, value, mask, *rest):
        _check(ptrs, mask, "store")
        return stock_store(self, ptrs, value, mask, *rest)

    def rmw(self, op, ptrs, value, mask, *rest):
        _check(ptrs, mask, "atomic")
        return stock_rmw(self, op, ptrs, value, mask, *rest)

    def init_args(self, args, kwargs):
        args_hst, kwargs_hst = stock_init(self, args, kwargs)
        _ranges.clear()
        for argument in [*args_hst, *kwargs_hst.values()]:
            _remember_extents(argument)
        return args_hst, kwargs_hst

    Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw = load, store, rmw
    interp.GridExecutor._init_args_hst = init_args


# -------------------------------------------------------------------------------------------------------------- speed


def _install_fast_calls():
    patched_globals = set()
    stock_call, stock_launch = interp.InterpretedFunction.__call__, interp.GridExecutor.__call__

    def call(self, *args, **kwargs):
        key = id(self.fn.__globals__)
        if key not in patched_globals:
            patched_globals.add(key)
            return stock_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def launch(self, *args, **kwargs):
        patched_globals.clear()  # a launch restores triton.language when it ends
        return stock_launch(self, *args, **kwargs)

    interp.InterpretedFunction.__call__, interp.GridExecutor.__call__ = call, launch


def _install_plain_integers():
    options = interp.interpreter_builder.options
    assert not options.debug  # what looks at the 64-bit results
    interp.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _install_known_types():
    """The NumPy type of a Triton type is looked up; the stock function makes a table of all of them in each call."""
    stock, known = interp._get_np_dtype, {}

    def np_dtype(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = stock(kind)
        return known[name]

    interp._get_np_dtype = np_dtype


_installed = False


def install():
    """Fix the interpreter of this process. Calling it twice does nothing."""
    global _installed
    if not _installed:
        _install_bf16()
        _install_bounds()
        _install_fast_calls()
        _install_plain_integers()
        _install_known_types()
        _installed = True
