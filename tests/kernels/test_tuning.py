import json
import sys

import pytest
import torch

from flagscale_kernels import _tuning
from flagscale_kernels._tuning import Config, TunedKernel, length_class, tile_lists

FIRST, SECOND = Config(bm=64, bn=64), Config(bm=128, bn=64)
LISTS = tile_lists(
    sm80=[FIRST, SECOND],
    sm90=[SECOND, FIRST],
    wide=Config(bm=32, bn=32),
    wide90=Config(bm=32, bn=64),
    other=Config(bm=64, bn=32),
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


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    monkeypatch.setenv(_tuning.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(_tuning.AUTOTUNE_VARIABLE, raising=False)
    monkeypatch.setattr(_tuning, "arch", lambda: 80)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return TunedKernel(Kernel(), LISTS)


def launch(tuned, **options):
    tuned.launch(lambda c: (c.bm,), block_d=64, element_bytes=2, **options)
    return tuned.kernel.launches[-1]


def faster_is(monkeypatch, times):
    """do_bench gives these times one after the other; an empty list means it must not be called."""
    left = list(times)

    def milliseconds(call):
        call()
        return left.pop(0)

    monkeypatch.setattr(_tuning, "_milliseconds", milliseconds)


def test_the_faster_config_is_measured_once_and_kept(tuned, monkeypatch):
    faster_is(monkeypatch, [2.0, 1.0])
    assert launch(tuned) == ((128,), 128)
    assert launch(tuned) == ((128,), 128)
    assert [bm for _, bm in tuned.kernel.launches] == [64, 128, 128, 128]


def test_the_choice_survives_on_disk_and_belongs_to_its_list(tuned, monkeypatch, tmp_path):
    faster_is(monkeypatch, [2.0, 1.0])
    launch(tuned)
    [path] = (tmp_path / "cache").iterdir()
    assert path.name.startswith("NVIDIA_A100-triton-")
    faster_is(monkeypatch, [])
    assert launch(TunedKernel(Kernel(), LISTS)) == ((128,), 128)
    faster_is(monkeypatch, [1.0, 2.0])
    assert launch(TunedKernel(Kernel(), lambda *_: [FIRST, SECOND, FIRST][:2][::-1])) == ((128,), 128)
    assert len(json.loads(path.read_text())) == 2


def test_a_damaged_cache_file_is_measured_again(tuned, monkeypatch, tmp_path):
    faster_is(monkeypatch, [2.0, 1.0])
    launch(tuned)
    [path] = (tmp_path / "cache").iterdir()
    path.write_text("{half a file")
    faster_is(monkeypatch, [1.0, 2.0])
    assert launch(TunedKernel(Kernel(), LISTS)) == ((64,), 64)


def test_a_key_of_its_own_is_measured_on_its_own(tuned, monkeypatch):
    faster_is(monkeypatch, [2.0, 1.0, 1.0, 2.0])
    assert launch(tuned, key=(True,)) == ((128,), 128)
    assert launch(tuned, key=(False,)) == ((64,), 64)


def test_without_autotuning_and_while_capturing_a_graph_the_first_config_runs(tuned, monkeypatch):
    faster_is(monkeypatch, [])
    monkeypatch.setenv(_tuning.AUTOTUNE_VARIABLE, "0")
    assert launch(tuned) == ((64,), 64)
    monkeypatch.delenv(_tuning.AUTOTUNE_VARIABLE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch(tuned) == ((64,), 64)


def test_each_chip_has_its_list():
    assert LISTS(80, 128, 2) == [FIRST, SECOND]
    assert LISTS(90, 64, 2) == [SECOND, FIRST]
    assert LISTS(80, 256, 2) == [Config(bm=32, bn=32)]
    assert LISTS(90, 256, 2) == [Config(bm=32, bn=64)]
    assert LISTS(90, 64, 4) == [Config(bm=16, bn=16)]
    assert LISTS(120, 64, 2) == LISTS(-1, 64, 2) == [Config(bm=64, bn=32)]


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
