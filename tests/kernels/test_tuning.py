import json
import sys

import pytest
import torch

from flagscale_kernels import _tuning
from flagscale_kernels._checks import say_once
from flagscale_kernels._tuning import Config, TunedKernel, length_class, tile_lists

FIRST, SECOND = Config(bm=64, bn=64), Config(bm=128, bn=64)
LISTS = tile_lists(
    sm80={64: [FIRST, SECOND], 256: [Config(bm=32, bn=32)]},
    sm90={128: [SECOND, FIRST], 256: [Config(bm=32, bn=64)]},
    other={256: [Config(bm=64, bn=32)]},
    float32=Config(bm=16, bn=16),
    interpreter=Config(bm=64, bn=16),
)


class Kernel:
    """Stands for a jit kernel: records its launches."""

    __name__ = "kernel"

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, options["BM"]))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An A100 that captures no graph, autotuning as by default, and an empty cache folder."""
    monkeypatch.setenv("FLAGSCALE_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLAGSCALE_KERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(_tuning, "device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tmp_path / "cache"


def tuned(times, configs=LISTS):
    """A kernel whose launches take these times when they are measured; without times it must not be measured."""
    left = list(times)

    def milliseconds(call):
        call()
        return left.pop(0)

    return TunedKernel(Kernel(), configs, chip=lambda: 80, milliseconds=milliseconds)


def launch(tuned, **options):
    tuned.launch(lambda c: (c.bm,), block_d=64, element_bytes=2, **options)
    return tuned.kernel.launches[-1]


def test_the_faster_config_is_measured_once_and_kept():
    kernel = tuned([2.0, 1.0])
    assert launch(kernel) == ((128,), 128)
    assert launch(kernel) == ((128,), 128)
    assert [bm for _, bm in kernel.kernel.launches] == [64, 128, 128, 128]


def test_the_choice_survives_on_disk_and_belongs_to_its_list(cache):
    launch(tuned([2.0, 1.0]))
    [path] = cache.iterdir()
    assert path.name.startswith("NVIDIA_A100-triton-")
    assert launch(tuned([])) == ((128,), 128)
    assert launch(tuned([1.0, 2.0], configs=lambda *_: [SECOND, FIRST])) == ((128,), 128)
    assert len(json.loads(path.read_text())) == 2


def test_a_damaged_cache_file_is_measured_again(cache):
    launch(tuned([2.0, 1.0]))
    [path] = cache.iterdir()
    path.write_text("{half a file")
    assert launch(tuned([1.0, 2.0])) == ((64,), 64)


def test_a_key_of_its_own_is_measured_on_its_own():
    kernel = tuned([2.0, 1.0, 1.0, 2.0])
    assert launch(kernel, key=(True,)) == ((128,), 128)
    assert launch(kernel, key=(False,)) == ((64,), 64)


def test_without_autotuning_and_while_capturing_a_graph_the_first_config_runs(monkeypatch):
    monkeypatch.setenv("FLAGSCALE_KERNELS_AUTOTUNE", "0")
    assert launch(tuned([])) == ((64,), 64)
    monkeypatch.delenv("FLAGSCALE_KERNELS_AUTOTUNE")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch(tuned([])) == ((64,), 64)


def test_two_kinds_of_chips_in_a_process_do_not_share_a_choice(monkeypatch):
    kernel = tuned([2.0, 1.0, 1.0, 2.0])
    assert launch(kernel) == ((128,), 128)
    monkeypatch.setattr(_tuning, "device_name", lambda: "NVIDIA H100")
    assert launch(kernel) == ((64,), 64)
    monkeypatch.setattr(_tuning, "device_name", lambda: "NVIDIA A100")
    assert launch(kernel) == ((128,), 128)


def test_a_user_without_a_home_keeps_the_choice_in_the_process(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FLAGSCALE_KERNELS_CACHE")
    monkeypatch.setattr(_tuning.Path, "home", home)
    kernel = tuned([2.0, 1.0])
    assert launch(kernel) == launch(kernel) == ((128,), 128)


def test_where_no_memory_is_left_to_measure_the_default_runs_and_is_said_and_not_stored(cache):
    def milliseconds(call):
        raise torch.OutOfMemoryError

    kernel = TunedKernel(Kernel(), LISTS, chip=lambda: 80, milliseconds=milliseconds)
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="no GPU memory is left to measure tiles of kernel"):
        assert launch(kernel) == ((64,), 64)
    assert launch(kernel) == ((64,), 64)
    assert not cache.exists()
    assert launch(tuned([2.0, 1.0])) == ((128,), 128)


def test_each_chip_and_width_has_its_list():
    assert LISTS(80, 64, 2) == LISTS(80, 16, 2) == [FIRST, SECOND]
    assert LISTS(80, 128, 2) == [Config(bm=32, bn=32)]
    assert LISTS(90, 64, 2) == [SECOND, FIRST]
    assert LISTS(80, 256, 2) == [Config(bm=32, bn=32)]
    assert LISTS(90, 256, 2) == [Config(bm=32, bn=64)]
    assert LISTS(90, 64, 4) == [Config(bm=16, bn=16)]
    assert LISTS(120, 64, 2) == LISTS(-1, 64, 2) == [Config(bm=64, bn=32)]
    assert LISTS(90, 512, 2) == []


@pytest.mark.parametrize("chip", [80, 86, 90])
@pytest.mark.parametrize("operator", ["flash_attention", "piecewise_attention"])
def test_every_width_has_a_kernel_for_dk_and_dv(operator, chip):
    kernels = sys.modules[f"flagscale_kernels.{operator}"].KERNELS
    for width in (16, 64, 96, 128, 160, 192, 256):
        together, dk, dv = (kernel.configs(chip, width, 2) for kernel in (kernels.dkdv, kernels.dk, kernels.dv))
        assert together or (dk and dv)
        assert kernels.dq.configs(chip, width, 2)
        assert not (chip == 90 and width > 160 and together), "their sums do not fit into the registers of one pass"


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("operator", ["flash_attention", "piecewise_attention"])
def test_every_attention_kernel_has_alternatives_to_choose_from(operator, chip):
    module = sys.modules[f"flagscale_kernels.{operator}"]
    for kernel in (module.forward_kernel, module.dkdv_kernel, module.dq_kernel):
        configs = kernel.configs(chip, 128, 2)
        assert 2 <= len(set(configs)) == len(configs) <= 4, f"{kernel.name} on sm_{chip}: {configs}"


def test_other_chips_get_more_than_one_stage_and_more_than_32x32():
    from flagscale_kernels.flash_attention import dkdv_kernel, dq_kernel, forward_kernel

    for kernel in (forward_kernel, dkdv_kernel, dq_kernel):
        [config] = kernel.configs(89, 128, 2)
        assert config.bm * config.bn > 32 * 32
        assert config.stages > 1


def test_lengths_fall_into_three_classes():
    assert length_class(1) == length_class(1024) == 1024
    assert length_class(1025) == length_class(4096) == 4096
    assert length_class(5000) == length_class(1 << 20)
