"""Where in the code the host is, and in which part of a step: what records and memory reports name things by."""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from megatron.core.transformer import TransformerLayer
from torch import nn
from torch._C._autograd import _get_sequence_nr

# Folders whose lines are named, and what their names begin with.
PACKAGES = ("flagscale_like", "flagscale_kernels", "megatron")
# Files whose lines call for others: not theirs is the place to look at.
PASSED_OVER = (str(Path(__file__).parent), "flagscale_kernels/_operators.py")

# A line's file -> the part of the step that it is, where no layer runs.
PARTS = (
    ("flagscale_like/engine/optimizer", "optimizer"),
    ("megatron/core/optimizer/", "optimizer"),
    ("flagscale_like/model/heads", "loss"),
    ("flagscale_like/objectives/", "loss"),
    ("flagscale_kernels/cross_entropy", "loss"),
    ("flagscale_kernels/linear_cross_entropy", "loss"),
    ("megatron/core/models/common/embeddings/", "embedding"),
    ("megatron/core/distributed/", "gradients"),
    ("megatron/core/pipeline_parallel/p2p", "pipeline"),
)


class Places:
    """Names the line and the part of the step at which an operator is called.

    Layers are found by hooks on modules while `watching`. In a backward pass the layer is the one whose forward pass made the
    node that runs: torch numbers the nodes in the order in which they are made.
    """

    def __init__(self) -> None:
        self._names: dict[CodeType, str | None] = {}
        self._layers: list[int] = []  # the layers that run, innermost last; with experts there is one
        self._starts: list[int] = [0]  # node numbers at which another layer begins, or ends
        self._owners: list[int] = [0]  # 0: no layer
        self._again = 0  # the layer that was recomputed last in this backward pass

    def line(self) -> str:
        """ "file.py:123 function" of the innermost line of PACKAGES; empty where there is none."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            name = self._names.get(code, "")
            if name == "":
                name = self._names[code] = _name_of(code)
            if name is not None:
                return f"{name}:{frame.f_lineno} {code.co_name}"
            frame = frame.f_back
        return ""

    def layer(self) -> int:
        """Number of the layer that runs, counted from 1 over the whole model; 0 outside the layers."""
        if self._layers:
            return self._layers[-1]
        if torch._C._current_graph_task_id() == -1:
            self._again = 0
            return 0
        if self._again:
            return self._again
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else 0
        return self._owners[bisect_right(self._starts, number) - 1]

    def part(self, line: str) -> str:
        """Of the step, in words; `line` is what line() gave."""
        backward = torch._C._current_graph_task_id() != -1
        layer = self.layer()
        if layer:
            direction = "forward" if not backward else "recompute" if self._layers else "backward"
            return f"layer {layer} {direction}"
        named = next((part for start, part in PARTS if line.startswith(start)), None)
        if backward:
            return f"{named} backward" if named else "backward"
        return named or "step"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, layers are seen."""
        hooks = (
            nn.modules.module.register_module_forward_pre_hook(self._begin),
            nn.modules.module.register_module_forward_hook(self._end, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        if isinstance(module, TransformerLayer):
            self._layers.append(module.layer_number)
            if torch._C._current_graph_task_id() != -1:
                self._again = module.layer_number
            else:
                self._note(module.layer_number)

    def _end(self, module: nn.Module, *_: Any) -> None:
        if isinstance(module, TransformerLayer):
            self._layers.pop()
            if torch._C._current_graph_task_id() == -1:
                self._note(0)

    def _note(self, owner: int) -> None:
        self._starts.append(_get_sequence_nr())
        self._owners.append(owner)


def _name_of(code: CodeType) -> str | None:
    """The file's name from its package on; None for files of other packages, and of the rehearsal itself."""
    path = code.co_filename
    if any(part in path for part in PASSED_OVER):
        return None
    for package in PACKAGES:
        found = path.rfind(f"/{package}/")
        if found >= 0:
            return path[found + 1 :]
    return None
