"""What the host reads of a tensor that has no data: the mean of its elements, as far as the operators tell it.

A step reads few numbers: whether fp16 overflowed, whether a rank is to stop, how many tokens go to each expert. They follow
from typing import Any
from constants and shapes once routing is taken to be even: a map of [tokens, experts] into which each token's top_k ones are
scattered has the mean top_k / experts, its sum over the tokens is tokens * top_k / experts for each expert, and so on through
the few operators below. Of anything else the answer is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

# A mean of all elements, or a number for each of them; None where one is not known.
Known = float | list[float | None]

FEW = 256  # elements of a tensor whose numbers are known one by one
# Operators whose output has the elements of their first input, in their order.
SAME = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten._to_copy.default,
}
# Operators whose output has some of the elements of their first input, or all in another order.
SOME = {
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
}
PARTS = {aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.zero_.default}
ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
MAP = aten.zeros_like.default  # of the tokens' scores: where a router's map of whole numbers begins
FILLS = {aten.fill_.Scalar, aten.full.default, aten.full_like.default, aten.new_full.default}
SUMS = {aten.sum.default, aten.sum.dim_IntList}
# What changes a tensor in place, and if all goes well not its numbers.
KEEPING = {aten._amp_foreach_non_finite_check_and_unscale_.default}


class Expected:
    """What is known of tensors without data."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def see(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what an operator's output is, where its inputs tell it. function: torch's, an OpOverload."""
        if function in KEEPING or function.namespace == "c10d":
            return  # every rank has what this one has; a sum over them is 0 where it was
        if function in PARTS:
            self._cut(args[0], out)
            return
        found = self._output(function, args, kwargs, out)
        if found is None and not function._schema.is_mutable and not function.is_view:
            return  # a new tensor of which nothing is known
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, Tensor):
                self._note(tensor, found, always=function is MAP)

    def _output(self, function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Known | None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if function in SAME and first is not None:
            return self.of(first)
        if function in SOME and first is not None:
            found = self.of(first)
            return None if isinstance(found, list) else found
        if function in ZEROS:
            return 0.0
        if function in ONES:
            return 1.0
        if function in FILLS:
            value = args[1] if len(args) > 1 else kwargs.get("value", kwargs.get("fill_value"))
            return float(value) if isinstance(value, (int, float)) else None
        if function is aten.copy_.default:
            return self.of(args[1])
        if function is aten.cat.default:
            parts = [self._each(tensor) for tensor in args[0]]
            return [number for part in parts for number in part] if out.numel() <= FEW else None
        mean = self.of(first) if first is not None else None
        if first is None or not isinstance(mean, float):
            return None
        if function in SUMS and isinstance(out, Tensor):
            return mean * first.numel() / max(1, out.numel())
        if function is aten.scatter.value:
            _, dim, index, value = args
            return mean + value * index.shape[dim] / first.shape[dim]
        return None

    def of(self, tensor: Tensor) -> Known | None:
        """What is known of a tensor; of one with data, all, if it is small."""
        if isinstance(tensor, FakeTensor):
            return self._known.get(tensor)
        if tensor.device.type != "cpu" or tensor.numel() > FEW:
            return None
        with unset_fake_temporarily():
            return tensor.flatten().tolist()

    def gathered(self, source: Tensor, target: Tensor) -> None:
        """A collective wrote `target` from the ranks' `source`."""
        found = self.of(source)
        if isinstance(found, list) and len(set(found)) == 1:
            (found,) = set(found)
        self._note(target, float(found) if isinstance(found, (int, float)) else None)

    def _each(self, tensor: Tensor) -> list[float | None]:
        found = self.of(tensor)
        return found if isinstance(found, list) else [found] * min(tensor.numel(), FEW + 1)

    def _cut(self, source: Tensor, parts: Sequence[Tensor]) -> None:
        found, place = self.of(source), 0
        for part in parts:
            own = found
            if isinstance(found, list):
                own = found[place : place + part.numel()] if source.dim() == 1 else None
            place += part.numel()
            self._note(part, own)

    def _note(self, tensor: Tensor, found: Known | None, *, always: bool = False) -> None:
        if not isinstance(tensor, FakeTensor):
            return
        if tensor.is_floating_point() and tensor.numel() > FEW and not always:
            return  # nobody reads it
        if found is not None:
            self._known[tensor] = found
        else:
            self._known.pop(tensor, None)

    def number(self, tensor: Tensor) -> float | int | bool:
        """What the host reads of a tensor of one element.

        Whole numbers of one tensor are shared out so that their sum is what the mean says, rounded down.
        """
        found = self._known.get(tensor, 1.0)
        if isinstance(found, list):
            found = 1.0 if found[0] is None else found[0]
        if tensor.dtype == torch.bool:
            return bool(found)
        if tensor.is_floating_point():
            return float(found)
        place = tensor.storage_offset()
        return math.floor(found * (place + 1) + 1e-9) - math.floor(found * place + 1e-9)

    def trues(self, mask: Tensor) -> int | None:
        """How many elements of a mask are set; None where that is not known."""
        found = self._known.get(mask)
        return round(found * mask.numel()) if isinstance(found, float) else None

    def numbers(self, tensor: Tensor) -> list[int]:
        """The elements of a tensor of whole numbers, shared out as by `number`."""
        found = self._known.get(tensor, 1.0)
        if isinstance(found, list):
            return [1 if n is None else int(n) for n in found]
        ends = [math.floor(found * place + 1e-9) for place in range(tensor.numel() + 1)]
        return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
