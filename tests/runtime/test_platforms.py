"""Platforms are found by name, by what the machine has and as plug-ins; a plug-in trains as gloo does, bit for bit."""

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from flagscale_like.errors import ConfigError, PlatformError
from flagscale_like.model.build import check_platform, kernels_of
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime import launch
from flagscale_like.runtime.megatron_versions import VERSIONS, installed
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms import CHIPS, Chip, Platform, choose, get_platform, prepared, survey
from flagscale_like.runtime.platforms.choice import candidates
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from flagscale_like.runtime.platforms.cuda import CudaPlatform
from flagscale_like.runtime.platforms.table import platform_of
from tests.harness import REPOSITORY, build_engine, cli, run_ranks, tiny_config, train_steps

PLUGIN = Path(__file__).parent / "plugin"

# One launch trains each of them: tensor and sequence parallel with recompute, two stages in bf16, data parallel.
LAYOUTS = (
    {"parallel": {"tp": 2, "sp": True}, "train__recompute": "full"},
    {"parallel": {"pp": 2}, "train__precision": "bf16"},
    {},
)

# What megatron-core asks of torch.cuda in the steps of LAYOUTS, beside the current device: what a chip's namespace must have.
ASKED = {"get_rng_state", "manual_seed", "synchronize"} | VERSIONS[installed()].asks

# Whatever would touch a CUDA device.
REAL = (
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "default_stream",
    "empty_cache",
    "get_rng_state",
    "manual_seed",
    "set_rng_state",
    "stream",
    "synchronize",
)


def train_layouts(folder: Path, name: str) -> dict:
    """Three steps of each of LAYOUTS on the named platform, in a process where the real torch.cuda raises."""
    sys.path.insert(0, str(PLUGIN))
    os.environ["FLAGSCALE_LIKE_DEVICE"] = name
    get_platform.cache_clear()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.cuda itself was asked")

    for function in REAL:
        setattr(torch.cuda, function, refuse)
    steps, backends = [], set()
    for layout in LAYOUTS:
        config = tiny_config(folder, **layout, train__steps=3)
        with parallel_context(config.parallel) as ctx:
            backends.add(torch.distributed.get_backend())
            steps.append(train_steps(build_engine(config, ctx), config, 3))
    found = {"steps": steps, "backends": backends}
    if name == "example":
        plugin = importlib.import_module("example_chip")
        found |= {"groups": len(plugin.GROUPS), "asked": plugin.ASKED}
    return found


def test_a_plug_in_with_a_backend_of_its_own_trains_as_gloo_does_and_the_real_torch_cuda_is_left_alone(tmp_path):
    example = run_ranks(2, train_layouts, tmp_path, "example")
    gloo = run_ranks(2, train_layouts, tmp_path, "cpu")
    assert [rank["steps"] for rank in example] == [rank["steps"] for rank in gloo]
    losses = [loss for layout in example[1]["steps"] for loss, _ in layout]
    assert len(losses) == 9
    assert all(loss is not None and 5 < loss < 6 for loss in losses)
    for rank in example:
        assert rank["backends"] == {"exampleccl"}
        assert rank["groups"] > 10
        assert rank["asked"] == ASKED
    assert gloo[0]["backends"] == {"gloo"}


def register_chip() -> type[Platform]:
    """A device type that torch has never heard of, torch.chip, with one device; no kernels run on it."""

    class Namespace:
        def is_available(self) -> bool:
            return True

        def device_count(self) -> int:
            return 1

        def current_device(self) -> int:
            return 0

        def get_device_name(self, device: object = None) -> str:
            return "Example Chip 9000"

        def get_rng_state(self, device: torch.device) -> torch.Tensor:
            return torch.full((16,), device.index, dtype=torch.uint8)

    _setup_privateuseone_for_python_backend("chip", backend_module=Namespace())
    chip = Chip(
        name="chip", maker="x", torch_type="chip", module=None, backend="gloo", visible_env="CHIP_VISIBLE_DEVICES"
    )
    return platform_of(chip)


def read_chip() -> dict:
    platform = register_chip()
    here = platform()
    here.make_current()
    return {
        "missing": platform.missing(),
        "processes": platform.count(),
        "device": str(here.device),
        "current": torch.accelerator.current_device_index(),
        "stream": str(here.compute_stream()),
        "name": here.describe(),
        "sheet": here.data_sheet(),
        "random": here.rng_state().tolist(),
        "shim": (platform.needs_shim, here.fuses_main_grad, platform.compiles, platform.triton),
        "namespace": here.cuda_namespace().get_device_name(),
    }


def test_a_row_of_the_table_is_a_platform_through_torchs_own_interface():
    (found,) = run_ranks(1, read_chip)
    assert found == {
        "missing": None,
        "processes": 1,
        "device": "chip:0",
        "current": 0,
        "stream": "torch.Stream device_type=chip, device_index=0, stream_id=0",
        "name": "Example Chip 9000",
        "sheet": None,
        "random": [0] * 16,
        "shim": (True, True, False, False),
        "namespace": "Example Chip 9000",
    }


def test_every_row_becomes_a_platform_that_says_why_it_is_not_here():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS) == 10
    for chip in CHIPS:
        platform = platform_of(chip)
        assert (platform.name, platform.backend, platform.triton) == (chip.name, chip.backend, chip.triton)
        assert platform.not_run
        assert platform.missing(), chip.name
        assert platform.needs_shim == (chip.torch_type != "cuda")


def plug_in(folder: Path, package: str, name: str, source: str, attribute: str = "Found") -> None:
    """Write an installed package with one entry point of our group."""
    folder.mkdir(exist_ok=True)
    (folder / f"{package}.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[flagscale_like.platforms]\n{name} = {package}:{attribute}\n")


CLAIMS = """
from flagscale_like.runtime.platforms.cpu import CpuPlatform
class Found(CpuPlatform):
    name, claims, ranks_share_device = "NAME", True, False
    visible_env = "NAME_VISIBLE_DEVICES"
"""
NO_BACKEND = CLAIMS + '    backend = "lost"\n'
ROW = """
from flagscale_like.runtime.platforms import Chip
Found = Chip(name="npu", maker="x", torch_type="npu", module="its_torch", backend="hccl", visible_env="X")
"""


@pytest.fixture
def plug_ins(tmp_path, monkeypatch):
    """Write plug-ins into a folder that is on the path; the device is left open."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delenv("FLAGSCALE_LIKE_DEVICE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def write(package: str, name: str, source: str, **more: str) -> None:
        plug_in(tmp_path / "site", package, name, source.replace("NAME", name), **more)
        importlib.invalidate_caches()

    return write


def refusal(call=get_platform.__wrapped__) -> str:
    with pytest.raises(PlatformError) as found:
        call()
    message = str(found.value)
    assert "\n" not in message
    return message


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("FLAGSCALE_LIKE_DEVICE", "tpu")
    assert refusal() == (
        "FLAGSCALE_LIKE_DEVICE is 'tpu', which no platform is called: "
        "use one of cpu, cuda, rocm, npu, mlu, musa, xpu, kunlun, gcu, metax, iluvatar, hygon"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "torch sees no CUDA device"),
        ("npu", "the package torch_npu is not installed"),
        ("rocm", "this torch is not built for it (torch.version.hip is None)"),
    ],
)
def test_a_device_that_is_not_here_is_refused_with_the_reason(plug_ins, monkeypatch, name, reason):
    monkeypatch.setenv("FLAGSCALE_LIKE_DEVICE", name)
    assert refusal() == f"FLAGSCALE_LIKE_DEVICE is {name}, but {reason}: see `flagscale-like doctor`"


def test_a_plug_in_that_cannot_be_imported_says_why(plug_ins, monkeypatch):
    plug_ins("broken_chip", "broken", "raise OSError('libdriver.so.7: not found\\nmore')")
    assert refusal() == (
        "package broken_chip cannot be imported (OSError: libdriver.so.7: not found): "
        "mend or uninstall it, or choose another platform with FLAGSCALE_LIKE_DEVICE"
    )
    monkeypatch.setenv("FLAGSCALE_LIKE_DEVICE", "cpu")  # nor is it asked where another one is chosen
    assert choose() is CpuPlatform
    (broken,) = [each for each in survey() if each.name == "broken"]
    assert broken.platform is None
    assert "libdriver" in broken.reason


def test_two_plug_ins_that_claim_the_machine_are_not_chosen_between(plug_ins, monkeypatch):
    plug_ins("chip_a", "aaa", CLAIMS)
    assert choose().name == "aaa"
    plug_ins("chip_b", "bbb", CLAIMS)
    assert refusal() == "aaa and bbb both have devices here: choose one, as in FLAGSCALE_LIKE_DEVICE=aaa"
    monkeypatch.setenv("FLAGSCALE_LIKE_DEVICE", "bbb")
    assert choose().name == "bbb"


def test_what_passes_for_cuda_is_taken_before_cuda(plug_ins, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose() is CudaPlatform
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose().name == "rocm"


def test_a_local_rank_without_a_device_is_refused(plug_ins, monkeypatch):
    plug_ins("chip_c", "ccc", CLAIMS)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refusal() == "local rank 1 has no ccc device: 1 visible; start fewer processes a node"
    monkeypatch.setenv("ccc_VISIBLE_DEVICES", "5")
    assert "1 visible (ccc_VISIBLE_DEVICES)" in refusal()


def test_a_backend_that_torch_lacks_is_refused(plug_ins):
    plug_ins("chip_d", "ddd", NO_BACKEND)
    assert refusal() == (
        "the platform is ddd, but this torch has no communication backend 'lost': see `flagscale-like doctor`"
    )


def test_a_plug_in_may_replace_a_row_and_be_one_but_take_no_name_that_is_built_in_or_taken(plug_ins):
    plug_ins("chip_e", "npu", ROW)
    assert candidates()["npu"].origin == "package chip_e"
    assert candidates()["npu"].load().missing() == "the package its_torch is not installed"
    plug_ins("chip_f", "npu", ROW)
    assert refusal(candidates) in (
        "package chip_e and package chip_f both give a platform named npu: uninstall one",
        "package chip_f and package chip_e both give a platform named npu: uninstall one",
    )


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("cuda", CLAIMS, "package chip_g gives a platform named cuda, which is built in: rename it"),
        ("ggg", "Found = 3", "package chip_g: chip_g:Found is neither a Platform class nor a Chip"),
        ("ggg", ROW, "package chip_g: chip_g:Found is named 'npu', its entry point 'ggg'"),
    ],
)
def test_an_entry_point_that_is_no_platform_is_refused(plug_ins, monkeypatch, name, source, reason):
    monkeypatch.delitem(sys.modules, "chip_g", raising=False)
    plug_ins("chip_g", name, source)
    assert refusal() == reason


def test_the_launcher_starts_a_rank_a_device_and_on_a_shared_one_a_model(plug_ins, monkeypatch):
    assert launch.default_processes(4) == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.default_processes(4) == 8


def test_doctor_lists_the_platforms_that_are_here_and_why_others_are_not():
    paths = [str(PLUGIN), str(REPOSITORY), str(REPOSITORY / "kernels")]
    result = cli("doctor", PYTHONPATH=os.pathsep.join(paths), COLUMNS="200")
    text = " ".join(result.stdout.split())
    assert "platform cpu ok the host" in text
    assert "platform example ok the host (package example-chip)" in text
    assert "platform npu missing the package torch_npu is not installed" in text
    assert "chosen ok cpu, with gloo" in text
    assert "megatron-core is patched to run on cpu" in text


class Interpreting(CpuPlatform):
    """A CPU on which our Triton kernels run, as they do in Triton's interpreter."""

    triton = True


class Narrow(CpuPlatform):
    bf16 = False


def kernels_asked(folder: Path, platform: type) -> set:
    """Every backend that the model's operators ask flagscale_kernels for in one training step."""
    import flagscale_like.runtime.parallel as parallel

    asked = set()
    modules = [
        m for name, m in sys.modules.items() if name.startswith("flagscale_kernels.") and hasattr(m, "choose_backend")
    ]
    for module in modules:
        original = module.choose_backend

        def choose_backend(x, backend, module=module, original=original, **lacks):
            asked.add((module.__name__.rpartition(".")[2], backend))
            return original(x, backend, **lacks)

        vars(module)["choose_backend"] = choose_backend
    parallel.get_platform = platform
    config = tiny_config(folder)
    with parallel_context(config.parallel) as ctx:
        train_steps(build_engine(config, ctx), config, 1)
    return asked


def test_without_triton_every_operator_of_a_step_is_told_to_take_its_torch_path(tmp_path):
    (without,) = run_ranks(1, kernels_asked, tmp_path, CpuPlatform)
    (with_triton,) = run_ranks(1, kernels_asked, tmp_path, Interpreting)
    layers = {"rms_norm", "_gated", "rope", "flash_attention"}  # modules: SwiGLU is one of the gated activations
    assert without == {(operator, "torch") for operator in (*layers, "cross_entropy")}
    # Chosen by the tensor's device; where Triton runs, output layer and loss are one operator.
    assert with_triton == {(operator, None) for operator in (*layers, "linear_cross_entropy")}


def test_what_a_platform_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="train.precision is bf16, which cpu does not compute: use fp16 or fp32"):
        check_platform(ModelSpec.of(tiny_config(tmp_path, train__precision="bf16")), Narrow())
    config = tiny_config(tmp_path, kernels={"rope": "triton"})
    assert (
        kernels_of(config.kernels, CpuPlatform()).rope == "triton"
    )  # what is asked for by name is not changed in silence


JIT = """
import sys
import torch
if sys.argv[1] == "cuda":
    torch.cuda.device_count, torch.cuda.is_available = lambda: 1, lambda: True
import flagscale_like
import megatron.core.jit as jit
from megatron.core.jit import disable_jit_fuser, enable_jit_fuser, jit_fuser, noop_decorator
print(jit_fuser is torch.compile, jit_fuser is noop_decorator, "torch._inductor" in sys.modules)
"""


@pytest.mark.parametrize(("device", "printed"), [("cuda", "True False True"), ("cpu", "False True False")])
def test_megatron_cores_fusions_are_left_alone_on_cuda_and_keep_their_names_on_the_cpu(device, printed):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("FLAGSCALE_LIKE_DEVICE")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JIT, device],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.split() == printed.split(), result.stderr


def test_a_platform_is_prepared_once():
    assert prepared(CpuPlatform) is CpuPlatform
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


PAGE = (REPOSITORY / "docs" / "devices.md").read_text(encoding="utf-8")


def rows_under(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of docs/devices.md, without marks of code."""
    lines = PAGE.partition(heading)[2].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_page_has_the_tables_chips():
    documented = {
        (
            name,
            kind,
            package if package.startswith("torch_") else None,
            backend.split()[0],
            visible,
            triton == "yes",
            state,
        )
        for name, _, kind, package, backend, visible, triton, state in rows_under("## The chips of the table")
    }
    assert documented == {
        (c.name, c.torch_type, c.module, c.backend, c.visible_env, c.triton, "not run") for c in CHIPS
    }
    assert all(chip.bf16 and chip.pinned and chip.streams for chip in CHIPS)


def test_the_page_has_every_capability_and_its_default():
    words = {True: "true", False: "false", None: "none", 8192: "8192", 256 << 20: "256 MiB"}
    documented = {}
    for names, defaults, _ in rows_under("## Add a chip as a class"):
        documented |= dict(zip(names.split(", "), defaults.split(", "), strict=True))
    described = ("module", "visible_env", "environment", "not_run", "claims")
    here = {
        name: words[value]
        for name, value in vars(Platform).items()
        if name in Platform.__annotations__ and name not in described
    }
    assert documented == here


def test_the_pages_examples_are_platforms():
    row, subclass = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    found: dict = {}
    exec(row, found)
    assert platform_of(found["CHIP"]).missing() == "the package torch_example is not installed"
    exec(subclass, found)
    assert found["ExampleChip"].missing() == "the package torch_example is not installed"
    assert not found["ExampleChip"].pins_memory
