"""Each line that only a CUDA device reaches has run before a GPU sees it: with a stand-in for torch.cuda that records what it
is asked, and on a rehearsed device."""

import ast
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flagscale_kernels.linear_cross_entropy import _set_or_add_product
from flagscale_like.cluster import parse_cluster
from flagscale_like.recipes.benchmark import measure, peak_flops
from flagscale_like.recipes.rehearse import rehearse, rehearsed_kind
from flagscale_like.rehearsal.device import DEVICE, RehearsedPlatform
from flagscale_like.rehearsal.world import rehearsed_rank
from flagscale_like.runtime import launch
from flagscale_like.runtime.copies import CopyStream, HostPool
from flagscale_like.runtime.doctor import _platform, _shim
from flagscale_like.runtime.host_copy import HostCopies
from flagscale_like.runtime.platforms import CHIPS, Surveyed, base, cuda
from flagscale_like.runtime.platforms.table import platform_of
from flagscale_like.runtime.roofline import measure_device
from tests.harness import REPOSITORY, run_ranks, tiny_config

ROOTS = (REPOSITORY / "flagscale_like", REPOSITORY / "kernels" / "flagscale_kernels")
# What CUDA has, what it has not, and what is None where there are no streams.
HAS = {"has_streams", "pins_memory", "counts_device_memory", "overlaps_param_gather", "triton", "is_cuda"}
HAS_NOT = {"ranks_share_device", "needs_shim"}
OF_STREAMS = {"_stream", "_event"}
# Lines of CUDA that run elsewhere: file -> why.
ELSEWHERE = {
    "runtime/platforms/choice.py": "a device that is not there is refused: tests/runtime/test_platforms.py",
    "runtime/platforms/table.py": "other makers' devices: tests/runtime/test_platforms.py",
    "model/build.py": "a choice of kernels is refused: tests/runtime/test_platforms.py",
    "_operators.py": "launches on another device than the current one: the kernels' tests on a GPU",
    "cli/describe.py": "`this` as a cluster: measure_device is what runs there",
}


def side(test: ast.expr) -> bool | None:
    """What a condition is on CUDA; None where the device does not decide it."""
    if isinstance(test, ast.Attribute):
        return True if test.attr in HAS else False if test.attr in HAS_NOT else None
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "takes_cudas_way":
        return True
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = side(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.Compare) and isinstance(test.left, ast.Attribute) and test.left.attr in OF_STREAMS:
        return isinstance(test.ops[0], ast.IsNot)
    if isinstance(test, ast.BoolOp):
        known = [found for value in test.values if (found := side(value)) is not None]
        if known:
            return all(known) if isinstance(test.op, ast.And) else any(known)
    return None


def leaves(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def lines(body: list[ast.stmt]) -> Iterator[int]:
    for statement in body:
        for node in ast.walk(statement):
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.stmt) and not is_docstring:
                yield node.lineno


def lines_of_cuda(path: Path) -> set[int]:
    """The lines of a file that run on CUDA and not on a CPU."""
    tree, found = ast.parse(path.read_text()), set()
    if path.name == "cuda.py":
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found |= set(lines(node.body))
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and (taken := side(node.test)) is not None:
            found.add(node.lineno)
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            for place, statement in enumerate(body if isinstance(body, list) else ()):
                if not isinstance(statement, ast.If) or (taken := side(statement.test)) is None:
                    continue
                found |= set(lines(statement.body if taken else statement.orelse))
                if leaves(statement.orelse if taken else statement.body):
                    found |= set(lines(body[place + 1 :]))
    return found


def files_of_cuda() -> Iterator[tuple[Path, set[int]]]:
    """The files that have such lines, and the lines."""
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            name = str(path.relative_to(root))
            if name not in ELSEWHERE and not name.startswith("rehearsal/") and (found := lines_of_cuda(path)):
                yield path, found


class Recorded:
    """Answers for torch.cuda, torch.accelerator and a stream: notes what it is asked."""

    def __init__(self, asked: set[str]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*_: Any, **__: Any) -> Any:
            self._asked.add(name)
            numbers = {
                "elapsed_time": 1.0,
                "device_count": 1,
                "query": True,
                "get_device_name": "NVIDIA H100 80GB HBM3",
            }
            return numbers.get(name, self)

        return call

    def __getitem__(self, _: int) -> int:
        return 80 << 30

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *_: object) -> None: ...

    total_memory = 80 << 30


def stand_in(asked: set[str]) -> types.SimpleNamespace:
    """torch, as the platforms see it, without a device."""
    device = Recorded(asked)

    def empty(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.add("pinned" if pin_memory else "empty")
        return torch.empty(*sizes, **options)

    own = {"cuda": device, "accelerator": device, "empty": empty, "get_device_module": lambda _: device}
    own |= {"Stream": device.Stream, "Event": device.Event, "Generator": device.Generator}
    return types.SimpleNamespace(
        **{name: getattr(torch, name) for name in ("device", "dtype", "Tensor", "profiler")}, **own
    )


def use_the_platform(asked: set[str]) -> None:
    """Each method of CudaPlatform, and what copies through it."""
    base.torch = cuda.torch = stand_in(asked)
    platform = cuda.CudaPlatform(0)
    assert cuda.CudaPlatform.count() == 1
    assert cuda.CudaPlatform.missing() is None
    platform.make_current()
    with platform.on_stream(platform.side_stream()), platform.on_stream(None):
        pass
    assert base.Platform.side_stream(platform) is not None
    assert platform.fuses_main_grad is False
    assert platform.total_memory_bytes() == 80 << 30
    for ask in (
        platform.cuda_namespace, platform.describe, platform.data_sheet, platform.rng_state, platform.synchronize,
        platform.peak_memory_bytes, platform.reset_peak_memory, platform.event, platform.compute_stream,
    ):  # fmt: skip
        ask()
    platform.generator(1)
    platform.set_rng_state(torch.zeros(0))
    out, source, pool = CopyStream(platform), torch.ones(8), HostPool(platform)
    buffer, _ = pool.get(32)
    ticket = out.copy(buffer[:32].view(torch.float32), source, after=Recorded(asked))
    out.wait(ticket)
    out.wait(None)
    pool.put(buffer, ticket)
    assert out.times().copy_s > 0
    copies = HostCopies(platform)
    for _ in range(2):
        copies.begin()
        copies.copy("weights", source)
        copies.end()
        copies.hold_compute()
    copies.wait()
    launch.choose = lambda: cuda.CudaPlatform
    assert launch.default_processes(4) == 1
    assert "as released" in _shim(cuda.CudaPlatform)
    quiet = platform_of(next(chip for chip in CHIPS if chip.torch_type == "cuda" and not chip.claims))
    assert "not told from cuda" in _platform(Surveyed(quiet.name, "table", quiet, 1, None)).detail
    assert "H100" in _platform(Surveyed("cuda", "built in", cuda.CudaPlatform, 1, None)).detail


def run_cuda_lines(folder: str) -> tuple[dict[str, set[int]], set[str]]:
    """Run all of it; the lines of our files that ran, and what the stand-in was asked."""
    seen: dict[str, set[int]] = {str(path): set() for path, _ in files_of_cuda()}

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        lines_ = seen.get(frame.f_code.co_filename)
        if lines_ is None:
            return None

        def local(frame: types.FrameType, event: str, _: Any) -> Any:
            if event == "line":
                lines_.add(frame.f_lineno)
            return local

        return local

    asked: set[str] = set()
    place = parse_cluster("1x8xH100")
    changes = {"parallel": {"pp": 2}, "offload": {"share": "auto"}, "train__precision": "bf16"}
    config = tiny_config(folder, model__num_layers=2, train__global_batch_size=4, **changes)
    sys.settrace(trace)
    try:
        list(rehearse(config, place, rehearsed_kind("cuda"), world_size=2, ranks="1"))
        alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pp": 1}), "offload": None})
        platform = RehearsedPlatform(rehearsed_kind("cuda"), place.device)
        with rehearsed_rank(platform, alone.parallel, 0, 1) as ctx:
            assert measure_device(platform, "bf16").efficiency == "hopper"
            assert measure(alone, ctx, steps=1, warmup=1).dynamic is not None
            platform.data_sheet = lambda: None
            assert "not a known device" in peak_flops(alone, ctx)[1]
            # The gradient of the output layer, where the products are added to fp32 gradients (with apex).
            wide, narrow = (torch.zeros(4, 4, dtype=t, device=DEVICE) for t in (torch.float32, torch.bfloat16))
            _set_or_add_product(wide, narrow, narrow, add=True)
        use_the_platform(asked)
    finally:
        sys.settrace(None)
    return seen, asked


def test_every_line_of_cuda_has_run(tmp_path):
    ((seen, asked),) = run_ranks(1, run_cuda_lines, str(tmp_path))
    missed, count = [], 0
    for path, wanted in files_of_cuda():
        count += len(wanted)
        missed += [f"{path.relative_to(REPOSITORY)}:{line}" for line in sorted(wanted - seen[str(path)])]
    print(f"{count - len(missed)} of {count} lines that only CUDA reaches have run")
    assert not missed, f"{len(missed)} of {count} lines that only CUDA reaches have not run: {', '.join(missed)}"
    assert {"Stream", "stream", "wait_stream", "wait_event", "record", "synchronize", "pinned", "set_device"} <= asked


def test_a_line_of_cuda_is_found(tmp_path):
    """The finder itself: both sides of a branch, an early return, an expression."""
    path = tmp_path / "some.py"
    path.write_text(
        "def f(self, platform):\n"
        "    if self._stream is None:\n"
        "        return 1\n"
        "    a = 2\n"
        "    if not platform.ranks_share_device:\n"
        "        a = 3\n"
        "    b = 1 if platform.pins_memory else 0\n"
        "    return a + b\n"
    )
    assert lines_of_cuda(path) == {4, 5, 6, 7, 8}
