"""Clusters, hostfiles and Slurm's environment."""

import pytest

from flagscale_like.cluster import (
    expand_nodelist,
    find_device,
    hosts_from_slurm,
    parse_cluster,
    read_hostfile,
    with_devices,
)
from flagscale_like.errors import ConfigError


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


def test_devices_are_found_by_their_drivers_names():
    assert find_device("NVIDIA A100-SXM4-40GB").hbm_bytes >> 30 == 40
    assert find_device("NVIDIA A100-SXM4-80GB").hbm_bytes >> 30 == 80
    assert find_device("NVIDIA H100 PCIe").bf16_flops == 756e12
    assert find_device("CPU (2 threads)") is None


def test_a_cluster_is_cut_to_whole_nodes_or_a_part_of_one():
    cluster = parse_cluster("4x8xH100")
    assert with_devices(cluster, 4).devices_per_node == 4
    assert with_devices(cluster, 16).nodes == 2
    with pytest.raises(ConfigError, match=r"devices \(12\) must be a multiple of devices a node \(8\)"):
        with_devices(cluster, 12)


def test_a_hostfile_names_hosts_and_slots(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# rack 1\nnode-1 slots=8\nnode-2   slots = 8  # the new one\n\n")
    hosts = read_hostfile(file)
    assert hosts.names == ("node-1", "node-2")
    assert hosts.slots_per_node == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a slots=8\na slots=8", ":2: host a is listed twice"),
        ("a slot=8", ":1: 'a slot=8': write it as"),
        ("a slots=0", "write it as"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(text, message, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_unequal_nodes_are_refused_with_both_numbers(tmp_path):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\n")
    with pytest.raises(ConfigError, match=r"4 to 8 slots \(b: 4, a: 8\)"):
        _ = read_hostfile(tmp_path / "hosts").slots_per_node


def test_slurms_compressed_lists_are_written_out():
    assert expand_nodelist("gpu[01-03,7],login") == ["gpu01", "gpu02", "gpu03", "gpu7", "login"]
    assert expand_nodelist("r[1-2]n[08-09]") == ["r1n08", "r1n09", "r2n08", "r2n09"]
    for wrong in ("gpu[3-1]", "gpu[a]", "gpu[1-2"):
        with pytest.raises(ConfigError):
            expand_nodelist(wrong)


def test_slurms_environment_gives_hosts_and_slots():
    job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "8(x2),4"}
    assert hosts_from_slurm(job).slots == (8, 8, 4)
    one = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}
    assert hosts_from_slurm(one).slots_per_node == 8
    assert hosts_from_slurm({}) is None
    with pytest.raises(ConfigError, match=r"2 nodes .* 3"):
        hosts_from_slurm({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "8(x3)"})
