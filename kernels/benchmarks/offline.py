"""Compile kernels for a GPU without having one, and read the resources that they need. No kernel runs.

Needs Triton's wheel, which includes ptxas and cuobjdump, and a process without TRITON_INTERPRET.
"""

import atexit
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as on a GPU; triton reads it at its import
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # compiles faster; only debuggers need it

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

SHARED_BYTES = {80: 166912, 90: 232448}  # the most dynamic shared memory of a block: 163 and 227 KiB
SM_REGISTERS, SM_WARPS, SM_BLOCKS = 65536, 64, 32
MATRIX_INSTRUCTIONS = ("HGMMA", "HMMA")  # wgmma and mma in the machine code
ARRIVE = "WARPGROUP.ARRIVE"


def _use_a_cache_folder_that_can_be_written():
    """Let Triton keep its cache in a temporary folder, deleted at exit, where its usual folder cannot be written."""
    try:
        os.makedirs(triton.knobs.cache.dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=triton.knobs.cache.dir):
            return
    except OSError:
        triton.knobs.cache.dir = tempfile.mkdtemp(prefix="triton-cache-")
        atexit.register(shutil.rmtree, triton.knobs.cache.dir, ignore_errors=True)


_use_a_cache_folder_that_can_be_written()


class _OfflineDriver:
    """Answers the compiler's questions to the driver as a GPU of compute capability `arch` would."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps a cache of compiled kernels for each device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def source(function, seen=None):
    """The text of a jit function and of the jit functions and constants that it names, its position in the file left out."""
    seen = {} if seen is None else seen
    if function.__name__ not in seen:
        seen[function.__name__] = function.src
        for name in sorted(set(re.findall(r"\b[A-Za-z_]\w*\b", function.src))):
            used = function.__globals__.get(name)
            if isinstance(used, JITFunction):
                source(used, seen)
            elif isinstance(used, int | float | str):
                seen[name] = repr(used)
    return "\n".join(seen[name] for name in sorted(seen))


@dataclass
class Launch:
    """A launch: its kernel compiled, or None where `known` has its resources. `key` names source, arguments and options."""

    key: str
    kernel: object
    options: dict


@contextlib.contextmanager
def compile_only(arch, known=()):
    """Within this context each `kernel[grid](...)` compiles the kernel for sm_<arch> instead of running it.

    The tensors are meta tensors. Yields a list to which each launch adds a Launch. A kernel whose key is in `known` is not
    compiled.
    """
    launches, stock = [], KernelInterface.__getitem__
    state = {}  # of the launch in progress, for the hook below

    def hook(*, key, fn, **_):
        """Called before a kernel is compiled, unless this process has compiled it before; True skips the compilation."""
        # Paths of libraries differ from machine to machine.
        options = re.sub(r"/[^'\"\s]*/", "", str(key))
        text = f"{triton.__version__} sm_{arch} {options}\n{source(fn.jit_function)}"
        state["key"] = hashlib.sha256(text.encode()).hexdigest()[:24]
        return state["key"] in known

    def launch(kernel, grid):
        def call(*args, **kwargs):
            state.clear()
            found = kernel.warmup(*args, grid=grid, **kwargs)
            if "key" not in state:
                state["key"] = keys[found.hash]
            elif found is not None:
                keys[found.hash] = state["key"]
            launches.append(Launch(state["key"], found, kwargs))

        return call

    keys = _KEYS
    KernelInterface.__getitem__ = launch
    triton.runtime.driver.set_active(_OfflineDriver(arch))
    stock_hook, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, hook
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = stock
        triton.runtime.driver._active = None
        triton.knobs.runtime.jit_cache_hook = stock_hook


_KEYS = {}  # of the kernels that this process has compiled, by their hash


def _cuobjdump(option, path):
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled):
    """The resources of a compiled kernel: registers per thread, stack in bytes per thread (spills), shared memory in
    bytes per block, blocks that fit on an SM, the number of matrix instructions in the code and of their beginnings
    (WARPGROUP.ARRIVE: as many as HGMMA where ptxas waits after each product), and the loops that hold them
    (`machine_code.matrix_loops`).
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = _cuobjdump("-res-usage", f.name)
        # Disassembling takes a quarter of a second, so only kernels with matrix instructions are disassembled.
        sass = _cuobjdump("-sass", f.name) if "mma" in compiled.asm["ptx"] else ""
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    meta = compiled.metadata
    arch, warps = meta.target.arch, meta.num_warps
    register_blocks = SM_REGISTERS // (-(-used["REG"] // 8) * 8 * 32 * warps)
    shared_blocks = (SHARED_BYTES[arch] + 1024) // (meta.shared + 1024)  # each block also reserves 1 KiB
    blocks = min(SM_WARPS // warps, register_blocks, shared_blocks, SM_BLOCKS)
    return {
        "kernel": compiled.name,
        "arch": arch,
        "warps": warps,
        "stages": meta.num_stages,
        "registers": used["REG"],
        "stack": used["STACK"],
        "shared": meta.shared,
        "blocks_per_sm": blocks,
        "fits": meta.shared <= SHARED_BYTES[arch] and blocks > 0,
        **{name: machine_code.count(sass, name) for name in (*MATRIX_INSTRUCTIONS, ARRIVE)},
        "loops": machine_code.matrix_loops(sass, warps),
    }
