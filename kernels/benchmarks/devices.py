"""Where rows are measured: the CUDA device, or a stand-in on the CPU that fails at random places, for rehearsals."""

import itertools
import os
import random
import signal
import statistics
import time

import torch


class LostDeviceError(Exception):
    """No call to the device succeeds in this process any more."""


class CudaDevice:
    """The current CUDA device."""

    name, tiny = "cuda", False

    L2_BYTES = 256 << 20  # more than any card's
    HEAD_START_CYCLES = 2_000_000  # of the card's clock, 1.1 ms at 1.8 GHz

    def __init__(self, total_ms: float = 60.0) -> None:
        self.total_ms = total_ms  # the time of all repetitions together

    def describe(self) -> str:
        return torch.cuda.get_device_name()

    def times(self, call):
        """The median times of `call`: {"milliseconds" on the device, "host_milliseconds" to launch it}.

        Before each call the device is kept busy for about a millisecond, so that the host, which is slower than a short
        kernel, has launched everything when the device begins: a training step of a large model runs like that. Then
        the L2 cache is filled with other data.
        """
        cache = torch.empty(self.L2_BYTES, dtype=torch.int8, device="cuda")
        call()
        torch.cuda.synchronize()
        device_ms, host_ms = [], []
        while len(device_ms) < 5 or (len(device_ms) < 50 and sum(device_ms) < self.total_ms):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.HEAD_START_CYCLES)
            cache.zero_()
            start.record()
            before = time.perf_counter()
            call()
            host_ms.append((time.perf_counter() - before) * 1e3)
            end.record()
            torch.cuda.synchronize()
            device_ms.append(start.elapsed_time(end))
        return {"milliseconds": statistics.median(device_ms), "host_milliseconds": statistics.median(host_ms)}

    def milliseconds(self, call):
        return self.times(call)["milliseconds"]

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
    """A CPU that fails as a CUDA device may: errors of many classes, a hang, a killed process, a lost context.

    `seed` decides where; each process of a run gets the next one. The first failure of the seeds 0, 1 and 2 is one that ends
    the process. Its times are numbers without meaning.
    """

    name, tiny = "cpu", True

    def __init__(self, seed: int, hang_seconds: float = 3600.0) -> None:
        self.random, self.lost, self.hang_seconds = random.Random(seed), False, hang_seconds
        ends = [self._hang, self._kill, self._lose]
        self.next = ends[seed : seed + 1]
        self.errors = itertools.cycle(self._errors())

    def describe(self) -> str:
        return "stand-in"

    def _errors(self):
        import triton

        return [
            SystemExit("a peer that ends the program"),
            triton.errors.TritonError("a kernel that does not compile"),
            triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("CUDA driver error: invalid argument"),
            AssertionError(),
            KeyError("a peer's option"),
        ]

    def _hang(self):
        time.sleep(self.hang_seconds)

    def _kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def _lose(self):
        self.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _raise(self):
        raise next(self.errors)

    def _maybe_fail(self):
        if self.lost:
            self._lose()
        if self.random.random() < 0.3:
            kinds = [self._hang, self._kill, self._lose, *[self._raise] * 60]
            (self.next.pop() if self.next else self.random.choice(kinds))()

    def times(self, call):
        self._maybe_fail()
        call()
        return {"milliseconds": self.random.uniform(0.1, 1.0), "host_milliseconds": 0.0}

    def attempt(self, call):
        self._maybe_fail()
        return call()

    def rates(self):
        self._maybe_fail()
        return {"copy_gb_per_s": 1.0, "matrix_tflop_per_s": 1.0}

    def settle(self):
        if self.lost:
            raise LostDeviceError("CUDA error: an illegal memory access was encountered")
