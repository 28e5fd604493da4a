"""Real runs under the launch scripts: a killed rank, two agents on one machine, two network namespaces."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from flagscale_like.checkpoint.manifest import step_folders
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.harness import REPOSITORY, free_port, tiny_config, write_yaml
from tests.launch.test_scripts import FAKE_SSH, SETTINGS
from tests.tools import find_program, missing

STEPS = 2000  # more than any of these runs reaches


def environment(**more):
    env = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, "TRITON_INTERPRET")}
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return {**env, "PYTHONPATH": paths, "PYTHON": sys.executable, "MAX_RESTARTS": "2", **more}


def until(condition, what, timeout_s=240):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not in {timeout_s} s"
        time.sleep(0.05)
    return found


def last_step(run_dir):
    steps = faults.losses(run_dir)
    return steps[-1][0] if steps else 0


def rank_process(config_file, rank):
    """The process of a rank of the run that this YAML describes."""
    for process in psutil.process_iter(["cmdline"]):
        try:
            if str(config_file) in (process.info["cmdline"] or []) and process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"rank {rank} of {config_file} does not run")


def restarted(run_dir):
    return [r for r in read_metrics(Path(run_dir)) if "resilience/restarts" in r]


def flip_a_bit_of_the_newest(run_dir):
    """The step of the newest checkpoint, which is no longer whole."""
    folder = next(step_folders(Path(run_dir) / "checkpoints"))
    path = next(folder.glob("rank_*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return int(folder.name.removeprefix("step_"))


def test_a_killed_rank_under_torchrun_sh_goes_on_from_the_newest_good_checkpoint(tmp_path):
    config = tiny_config(tmp_path / "run", train__steps=STEPS, checkpoint={"interval": 5, "keep": 3})
    file = write_yaml(config, tmp_path / "run.yaml")
    log = tmp_path / "log"
    with open(log, "w") as out:
        command = [REPOSITORY / "launch" / "torchrun.sh", file]
        settings = environment(NPROC_PER_NODE="2")
        launcher = subprocess.Popen(command, cwd=REPOSITORY, env=settings, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: last_step(config.run_dir) >= 16, "step 16")
        victim, other = rank_process(file, 1), rank_process(file, 0)
        other.suspend()  # so that it saves nothing more before it is ended
        victim.kill()
        damaged = flip_a_bit_of_the_newest(config.run_dir)
        other.kill()
        until(lambda: restarted(config.run_dir), "the restart")
        launcher.terminate()
        launcher.wait(timeout=120)
    finally:
        launcher.kill()
    said = log.read_text()
    assert faults.resumed_from(config.run_dir) == damaged - 5, said
    assert f"step_{damaged:08d}" in said  # named with the reason
    stopped = int(re.search(r"stopped at step (\d+)", said)[1])
    assert [step for step, *_ in faults.losses(config.run_dir)] == list(range(1, stopped + 1))


def test_one_error_of_all_ranks_is_one_line_and_the_exit_code(tmp_path):
    data = {"sources": [{"path": "x"}], "tokenizer": str(tmp_path / "nowhere")}
    file = write_yaml(tiny_config(tmp_path / "run", data=data, parallel={"tp": 2}), tmp_path / "run.yaml")
    settings = environment(NPROC_PER_NODE="2", MAX_RESTARTS="0", OMP_NUM_THREADS="1")
    command = [REPOSITORY / "launch" / "torchrun.sh", file]
    found = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=120)
    assert found.returncode == 11
    assert found.stderr.splitlines() == [
        f"error: tokenizer {tmp_path}/nowhere: no such folder",
        "error: rank 0 ended with exit code 11; its error is above",
    ]


def two_nodes(tmp_path, fake_ssh, hosts, **settings):
    """Start a run of two nodes with a rank each, kill the second's, stop the run; by ssh_hostfile.sh alone."""
    config = tiny_config(
        tmp_path / "run", train__steps=STEPS, checkpoint={"interval": 5, "keep": 3}, parallel={"tp": 2}
    )
    file = write_yaml(config, tmp_path / "run.yaml")
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(fake_ssh)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    env = environment(
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        FAKE_SSH_HOSTS=str(tmp_path / "asked"),
        LOGS=str(tmp_path / "logs"),
        JOB=f"job-{uuid.uuid4().hex[:8]}",
        PORT=str(free_port()),
        **settings,
    )

    def hostfile(verb):
        command = [REPOSITORY / "launch" / "ssh_hostfile.sh", verb, tmp_path / "hosts", file]
        found = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr
        return found.stdout.splitlines()

    def logs():
        return "".join(path.read_text() for path in sorted((tmp_path / "logs").rglob("*.log")))

    try:
        assert len(hostfile("start")) == 2
        try:
            until(lambda: last_step(config.run_dir) >= 8, "step 8")
            assert [line for line in hostfile("status") if ": running" in line] == [f"{h}: running" for h in hosts]
            victim = rank_process(file, 1)
            assert victim.environ()["GROUP_RANK"] == "1"
            victim.kill()
            until(lambda: restarted(config.run_dir), "the restart")
            assert hostfile("stop") == [f"{host}: stopping" for host in hosts]
            until(lambda: hostfile("status") == [f"{host}: stopped" for host in hosts], "the end")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{logs()}") from None
    finally:
        for path in (tmp_path / "logs").rglob("*.pid"):
            if psutil.pid_exists(int(path.read_text())):
                os.killpg(int(path.read_text()), signal.SIGKILL)
    resumed = faults.resumed_from(config.run_dir)
    assert resumed >= 5
    assert resumed % 5 == 0
    stopped = int(re.search(r"stopped at step (\d+)", logs())[1])
    assert next(step_folders(Path(config.run_dir) / "checkpoints")).name == f"step_{stopped:08d}"
    assert "2 x CPU" in logs()


def test_two_agents_on_one_machine_survive_a_killed_rank(tmp_path):
    two_nodes(tmp_path, FAKE_SSH, ["localhost", "127.0.0.1"])


IN_NAMESPACE = FAKE_SSH.replace('exec sh -c "$3"', 'exec ip netns exec "$NAMESPACE-${2##*.}" sh -c "$3"')


@pytest.fixture
def namespaces():
    """Two network namespaces with a cable between them: their common prefix. Removed afterwards."""
    if os.geteuid() != 0:
        missing("network namespaces need root")
    find_program("ip")
    prefix = f"fl{uuid.uuid4().hex[:6]}"
    steps = [f"ip netns add {prefix}-1", f"ip netns add {prefix}-2"]
    steps += [f"ip link add eth0 netns {prefix}-1 type veth peer name eth0 netns {prefix}-2"]
    for n in (1, 2):
        steps += [f"ip -n {prefix}-{n} addr add 10.213.0.{n}/24 dev eth0"]
        steps += [f"ip -n {prefix}-{n} link set {device} up" for device in ("lo", "eth0")]
    folders = [Path(f"/etc/netns/{prefix}-{n}") for n in (1, 2)]
    try:
        for n, folder in enumerate(folders, 1):  # what `ip netns exec` puts over /etc: nobody answers DNS in there
            folder.mkdir(parents=True)
            (folder / "nsswitch.conf").write_text("hosts: files\n")
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n10.213.0.{n} {socket.gethostname()}\n10.213.0.{3 - n} other\n"
            )
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode:
                missing(f"network namespaces are not allowed here: {done.stderr.strip()}")
        yield prefix
    finally:
        for n, folder in enumerate(folders, 1):
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(["ip", "netns", "del", f"{prefix}-{n}"], capture_output=True)


@pytest.mark.soak
def test_two_nodes_with_networks_of_their_own_survive_a_killed_rank(tmp_path, namespaces):
    hosts = ["10.213.0.1", "10.213.0.2"]
    two_nodes(tmp_path, IN_NAMESPACE, hosts, NAMESPACE=namespaces, GLOO_SOCKET_IFNAME="eth0")
