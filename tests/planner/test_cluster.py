"""Clusters, and devices by name, known, measured and not known."""

import pytest

from flagscale_like.cluster import find_device, parse_cluster, with_devices
from flagscale_like.errors import ConfigError
from flagscale_like.planner.efficiency import EFFICIENCIES, HOPPER
from flagscale_like.runtime import roofline
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from flagscale_like.runtime.roofline import measure_device


def test_a_cluster_is_nodes_devices_and_a_name():
    cluster = parse_cluster("64x8xA100-40G")
    assert (cluster.devices, cluster.device.hbm_bytes >> 30, cluster.network_gb_per_s) == (512, 40, 25)
    assert parse_cluster("8xh800").device.link_gb_per_s == 200
    assert parse_cluster("2x4xH200", network_gb_per_s=12.5).network_gb_per_s == 12.5


@pytest.mark.parametrize("text", ["H100", "0x8xH100", "8x0xH100", "8xB300", "x8xH100", ""])
def test_a_cluster_that_is_not_understood_is_refused(text):
    with pytest.raises(ConfigError):
        parse_cluster(text)


def test_links_are_nvlink_inside_a_node_and_network_between():
    cluster = parse_cluster("2x8xA100")
    assert cluster.link_gb_per_s(8) == 300
    assert cluster.link_gb_per_s(2, stride=8) == 25


@pytest.mark.parametrize(
    ("driver", "name", "tflops", "gib"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40", 312, 40),
        ("A100-SXM4-40GB", "A100-40", 312, 40),
        ("NVIDIA A100-SXM4-80GB", "A100-80", 312, 80),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40", 312, 40),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80", 312, 80),
        ("NVIDIA A800-SXM4-80GB", "A800", 312, 80),
        ("NVIDIA H100 80GB HBM3", "H100", 989, 80),
        ("NVIDIA H100 PCIe", "H100-PCIe", 756, 80),
        ("NVIDIA H100 NVL", "H100-NVL", 835.5, 94),
        ("NVIDIA H200", "H200", 989, 141),
        ("NVIDIA H800", "H800", 989, 80),
        ("NVIDIA H20", "H20", 148, 96),
        ("NVIDIA L40S", "L40S", 362, 48),
        ("NVIDIA GeForce RTX 4090", "RTX-4090", 165.2, 24),
        ("NVIDIA B200", "B200", 2250, 180),
    ],
)
def test_devices_are_found_by_their_drivers_whole_names(driver, name, tflops, gib):
    device = find_device(driver)
    assert (device.name, device.bf16_flops / 1e12, device.hbm_bytes >> 30) == (name, tflops, gib)
    assert parse_cluster(f"8x{name}").device is parse_cluster(f"2x8x{driver}").device is device


@pytest.mark.parametrize(
    "driver",
    ["NVIDIA RTX A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100", "NVIDIA L40", "CPU (2 threads)", ""],
)
def test_another_device_is_not_taken_for_one_that_it_resembles(driver):
    assert find_device(driver) is None


def test_a_card_without_nvlink_is_not_planned_with_it():
    assert parse_cluster("8xA100-PCIe-40").link_gb_per_s(8) == 25
    assert parse_cluster("8xH100-NVL").link_gb_per_s(8) == 50


class Driver(CpuPlatform):
    """This machine's CPU under the name of a GPU's driver, with memory of its own: 16 GiB."""

    counts_device_memory, ranks_share_device = True, False

    def __init__(self, driver_name):
        super().__init__()
        self.driver_name = driver_name

    def describe(self):
        return self.driver_name

    def data_sheet(self):
        return find_device(self.driver_name)

    def total_memory_bytes(self):
        return 16 << 30


def test_a_measured_h100_is_planned_as_an_h100():
    device = measure_device(Driver("NVIDIA H100 80GB HBM3"), "bf16")
    assert (device.bf16_flops, device.hbm_bytes) == (989e12, 16 << 30)
    cluster = parse_cluster("2x8xthis", this_device=device)
    assert (cluster.network_gb_per_s, cluster.link_gb_per_s(8)) == (50, 450)
    assert EFFICIENCIES[device.efficiency] is HOPPER
    assert device.caveat is None


def test_a_device_that_is_not_known_is_measured_and_said_to_be(monkeypatch):
    monkeypatch.setattr(roofline, "gemm_flops", lambda *_: 5e12)
    device = measure_device(Driver("NVIDIA RTX A1000"), "bf16")
    assert device.bf16_flops == 5e12
    assert device.network_gb_per_s == device.link_gb_per_s == device.host_gb_per_s
    assert EFFICIENCIES[device.efficiency].gemm == 1.0
    assert device.caveat.startswith("NVIDIA RTX A1000 is not a known device: ")


def test_a_cluster_is_cut_to_whole_nodes_or_a_part_of_one():
    cluster = parse_cluster("4x8xH100")
    assert with_devices(cluster, 4).devices_per_node == 4
    assert with_devices(cluster, 16).nodes == 2
    with pytest.raises(ConfigError, match=r"devices \(12\) must be a multiple of devices a node \(8\)"):
        with_devices(cluster, 12)
