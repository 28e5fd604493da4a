"""The choice between a launch of our Triton kernels and a rival: the same computation written for one kind of chip.

A rival is asked at most once for each kind of call. It runs on the caller's own tensors after the plain launch, and it is
chosen only if its results agree with the plain ones and it is faster. One that raises, disagrees or is slower is not asked
again in this process. FLAGSCALE_KERNELS_RIVALS says whether any is asked.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flagscale_kernels._checks import say_once
from flagscale_kernels._tuning import AUTOTUNE_VARIABLE, device_name, median_milliseconds

RIVALS_VARIABLE = "FLAGSCALE_KERNELS_RIVALS"
NEVER, MEASURED, ALWAYS = "0", "1", "always"  # "always" is for tests: nothing is compared or measured
DEFAULT = NEVER  # a kernel that no GPU has run could end the process or never return
LARGEST_DIFFERENCE = 0.01  # relative RMS; bf16 rounds to 0.002


def difference(result: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of `expected`; equal infinities count as equal, nan is nan."""
    a, b = result.double(), expected.double()
    distance = torch.where(a == b, 0.0, a - b).square().mean().sqrt()
    return float(distance / torch.where(b.isinf(), 0.0, b).square().mean().sqrt().clamp_min(1e-30))


class Rivalry:
    """A rival of one kernel. `milliseconds(call)` measures a launch."""

    def __init__(self, name: str, milliseconds: Callable[[Callable[[], None]], float] = median_milliseconds) -> None:
        self.name, self.milliseconds = name, milliseconds
        self.wins: dict[tuple, bool] = {}

    def launch(
        self, plain: Callable[[], None], rival: Callable[[], None], outputs: Sequence[Tensor], key: tuple
    ) -> None:
        """Fill `outputs` by `plain()` or `rival()`. Calls with the same `key` share a choice."""
        mode = os.environ.get(RIVALS_VARIABLE, DEFAULT)
        if mode == ALWAYS:
            rival()
            return
        if mode == NEVER or os.environ.get(AUTOTUNE_VARIABLE) == "0":
            plain()
            return
        key = (device_name(), *key)
        if key not in self.wins:
            if torch.cuda.is_current_stream_capturing():  # a measurement breaks the capture of a CUDA graph
                plain()
                return
            self.wins[key] = self._wins(plain, rival, outputs)
        (rival if self.wins[key] else plain)()

    def _wins(self, plain, rival, outputs):
        try:
            plain()
            expected = [t.clone() for t in outputs]
            for t in outputs:
                t.fill_(float("nan"))
            rival()
            worst = max((difference(t, e) for t, e in zip(outputs, expected)), key=lambda d: (d != d, d))
            if not worst <= LARGEST_DIFFERENCE:
                say_once(
                    f"flagscale_kernels: {self.name} differs from the Triton kernel by {worst:.3g} on this device, so it is "
                    f"not used; {RIVALS_VARIABLE}={NEVER} does not ask it"
                )
                return False
            return self.milliseconds(rival) < self.milliseconds(plain)
        except Exception as error:
            say_once(f"flagscale_kernels: {self.name} is not used: {type(error).__name__}: {str(error)[:200]}")
            return False
