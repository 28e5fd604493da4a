"""Where rows are measured: the CUDA device, or a stand-in on the CPU that fails at random places, for rehearsals."""

import os
import random
import signal
import time

import torch


class LostDeviceError(Exception):
    """No call to the device succeeds in this process any more."""


class CudaDevice:
    """The current CUDA device."""

    name, tiny = "cuda", False

    def __init__(self, repetition_ms: float = 100.0) -> None:
        self.repetition_ms = repetition_ms

    def describe(self) -> str:
        return torch.cuda.get_device_name()

    def milliseconds(self, call):
        """The median time of `call`, with a cold L2 cache."""
        import triton

        return triton.testing.do_bench(call, warmup=25, rep=self.repetition_ms, return_mode="median")

    def attempt(self, call):
        """Call `call`, which is not measured."""
        return call()

    def rates(self, n=8192):
        """What the card reaches: GB/s of a copy, read and written, and TFLOP/s of a bf16 product of random numbers."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = 2 * source.numel() / self.milliseconds(lambda: target.copy_(source)) / 1e6
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return {"copy_gb_per_s": copy, "matrix_tflop_per_s": 2 * n**3 / self.milliseconds(lambda: a @ b) / 1e9}

    def settle(self):
        """Wait for the device and give back what is cached. Raises LostDeviceError where no call succeeds any more."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise LostDeviceError(str(error)) from error


class StandIn:
    """A CPU that fails as a CUDA device may: errors of many classes, a lost context, a killed process, a hang.

    `seed` decides where; each process of a run gets another one. Its times are numbers without meaning.
    """

    name, tiny = "cpu", True

    def __init__(self, seed: int, hang_seconds: float = 3600.0) -> None:
        self.random, self.lost, self.hang_seconds = random.Random(seed), False, hang_seconds

    def describe(self) -> str:
        return "stand-in"

    def _maybe_fail(self):
        import triton

        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        draw = self.random.random()
        if draw < 0.06:
            raise self.random.choice(
                [
                    RuntimeError("CUDA driver error: invalid argument"),
                    AssertionError(),
                    triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
                    triton.errors.TritonError("a kernel that does not compile"),
                    torch.OutOfMemoryError("CUDA out of memory"),
                    KeyError("a peer's option"),
                    SystemExit("a peer that ends the program"),
                ]
            )
        if draw < 0.08:
            self.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if draw < 0.09:
            os.kill(os.getpid(), signal.SIGKILL)
        if draw < 0.095:
            time.sleep(self.hang_seconds)

    def milliseconds(self, call):
        self._maybe_fail()
        call()
        return self.random.uniform(0.1, 1.0)

    def attempt(self, call):
        self._maybe_fail()
        return call()

    def rates(self):
        self._maybe_fail()
        return {"copy_gb_per_s": 1.0, "matrix_tflop_per_s": 1.0}

    def settle(self):
        if self.lost:
            raise LostDeviceError("CUDA error: an illegal memory access was encountered")
