"""The launch scripts: what they would run, what they refuse, and that no word of a user's becomes a command."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.harness import REPOSITORY
from tests.tools import find_program

LAUNCH = REPOSITORY / "launch"
SCRIPTS = ("torchrun.sh", "ssh_hostfile.sh", "slurm.sbatch")
SETTINGS = (
    "NNODES",
    "NPROC_PER_NODE",
    "RDZV_ENDPOINT",
    "RDZV_ID",
    "RDZV_IS_HOST",
    "LOCAL_ADDR",
    "MAX_RESTARTS",
    "JOB",
    "PYTHON",
)


def script(name, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    return subprocess.run(
        ["bash", str(LAUNCH / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**clean, **environment},
        timeout=60,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_valid_bash_and_can_be_started(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)]).returncode == 0
    assert os.access(LAUNCH / name, os.X_OK)
    assert "--dry-run" in (LAUNCH / name).read_text()


@pytest.mark.parametrize("name", [*(f"launch/{name}" for name in SCRIPTS), ".ci/run"])
def test_shellcheck_has_nothing_to_say(name):
    found = subprocess.run([find_program("shellcheck"), str(REPOSITORY / name)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_one_node_meets_at_a_port_of_its_own():
    found = script("torchrun.sh", "--dry-run", "x.yaml", "train.steps=3", NPROC_PER_NODE="4", PYTHON="python3.11")
    words = shlex.split(found.stdout)
    assert words[:3] == ["python3.11", "-m", "flagscale_like.runtime.torchrun"]
    assert words[-5:] == ["-m", "flagscale_like", "train", "x.yaml", "train.steps=3"]
    options = dict(zip(words[3:-5:2], words[4:-5:2], strict=True))
    assert options == {
        "--nnodes": "1",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "localhost:0",
        "--rdzv-id": "flagscale-like",
        "--max-restarts": "3",
    }


def test_several_nodes_need_a_place_to_meet():
    missing = script("torchrun.sh", "--dry-run", "x.yaml", NNODES="2")
    assert missing.returncode == 10
    assert missing.stderr == "error: NNODES is 2: give RDZV_ENDPOINT=HOST:PORT, the same on every node\n"
    found = script("torchrun.sh", "--dry-run", "x.yaml", NNODES="2", RDZV_ENDPOINT="n1:29400", RDZV_IS_HOST="1")
    assert "--nnodes 2" in found.stdout
    assert "--rdzv-endpoint n1:29400" in found.stdout
    assert "--rdzv-conf is_host=1" in found.stdout


def test_the_training_operators_variables_are_understood():
    kubeflow = {"PET_NNODES": "4:4", "PET_NPROC_PER_NODE": "8", "PET_RDZV_ENDPOINT": "job-worker-0:23456"}
    found = script("torchrun.sh", "--dry-run", "x.yaml", **kubeflow)
    assert "--nnodes 4:4 --nproc-per-node 8" in found.stdout
    assert "--rdzv-endpoint job-worker-0:23456" in found.stdout


@pytest.mark.parametrize(
    ("setting", "value"),
    [("NNODES", "0"), ("NNODES", "2; reboot"), ("NPROC_PER_NODE", "$(reboot)"), ("MAX_RESTARTS", "-1")],
)
def test_settings_that_are_no_numbers_are_refused(setting, value):
    found = script("torchrun.sh", "--dry-run", "x.yaml", **{setting: value})
    assert found.returncode == 10
    assert found.stderr.startswith(f"error: {setting} ({value}) must be a number")


# Hostfiles


@pytest.mark.parametrize(
    ("text", "hosts", "slots"),
    [
        ("n1 slots=8\nn2 slots=8\n", ["n1", "n2"], 8),
        ("# all\n\n  n1  slots = 4  # first\nn2 slots=4", ["n1", "n2"], 4),
        ("n1\nn2\n", ["n1", "n2"], 1),
        ("me@n1 slots=2\n", ["me@n1"], 2),
        ("10.0.0.1 slots=8 type=A800\n10.0.0.2 type=A800 slots=8 max_slots=8", ["10.0.0.1", "10.0.0.2"], 8),
    ],
    ids=["plain", "comments, blanks, no end of line", "no slots", "a user's name", "FlagScale's"],
)
def test_a_hostfile_names_hosts_and_slots(text, hosts, slots, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(text)
    lines = script("ssh_hostfile.sh", "--dry-run", "start", path, "x.yaml").stdout.splitlines()
    assert [line.split()[-1] for line in lines[::2]] == hosts
    assert all(f"'NPROC_PER_NODE={slots}'" in line for line in lines[1::2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nobody\n", ": names no host"),
        ("n1 slots=0\n", ":1: "),
        ("n1 slots=8 n2\n", ":1: "),
        ("n1 slots=8 speed=9\n", ":1: speed is not known: give slots, port, max_slots or type"),
        ("n1 port=x\n", ":1: port=x: must be a number"),
        ("n1\nn2\nn1\n", ":3: n1 is in line 1 already: give each host once, with all its slots"),
    ],
    ids=["nothing", "no slots at all", "words", "unknown", "no number", "twice"],
)
def test_a_wrong_hostfile_is_refused_with_its_line(text, message, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(text)
    found = script("ssh_hostfile.sh", "--dry-run", "start", path, "x.yaml")
    assert found.returncode == 10
    assert f"error: hostfile {path}{message}" in found.stderr


def test_a_node_may_have_an_ssh_port_of_its_own(tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=8 port=2222\nn2 slots=8\n")
    lines = script("ssh_hostfile.sh", "--dry-run", "start", tmp_path / "hosts", "x.yaml").stdout.splitlines()
    assert lines[0].split() == ["ssh", "-n", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-p", "2222", "--", "n1"]
    assert lines[2].split() == ["ssh", "-n", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", "n2"]


def test_a_job_script_without_scontrol_says_so_and_starts_nothing(tmp_path):
    found = script("slurm.sbatch", "x.yaml", SLURM_JOB_NODELIST="n[1-2]")
    assert found.returncode == 15
    assert "error: scontrol names no first node of this job (SLURM_JOB_NODELIST is 'n[1-2]')" in found.stderr


def test_nodes_with_different_slots_are_refused(tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=8\nn2 slots=4\n")
    found = script("ssh_hostfile.sh", "--dry-run", "start", tmp_path / "hosts", "x.yaml")
    assert found.returncode == 10
    assert "hosts:2: n2 has 4 slots, the others 8: every node must offer the same" in found.stderr


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=reboot", "n1;reboot", "$(reboot)", "n1`reboot`", "n1|sh", "'n1'", "n1&"]
)
def test_a_host_that_is_no_name_never_reaches_ssh(host, tmp_path):
    (tmp_path / "hosts").write_text(f"{host} slots=1\n")
    found = script("ssh_hostfile.sh", "start", tmp_path / "hosts", "x.yaml", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert found.returncode == 10
    assert "write it as `name slots=8`" in found.stderr


# ssh as sshd runs it: options, --, a host, and one text for the user's shell
FAKE_SSH = """#!/usr/bin/env bash
while [[ $1 != -- ]]; do shift; done
printf '%s\\n' "$2" >>"$FAKE_SSH_HOSTS"
exec sh -c "$3"
"""


@pytest.fixture
def ssh(tmp_path):
    """A PATH with an ssh that runs the command here, and the file that lists the hosts it was asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(FAKE_SSH)
    (folder / "ssh").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SSH_HOSTS": str(tmp_path / "asked")}


HOSTILE = [
    "run_dir=$(touch PWNED)",
    "x='; touch PWNED; '",
    "`touch PWNED`",
    "a\nb; touch PWNED",
    "\\'$IFS&& touch PWNED",
    "",
    "sp ace*",
]


def test_arguments_arrive_as_they_were_written_and_run_nothing(tmp_path, ssh):
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    echo = tmp_path / "python"
    echo.write_text(f"#!{sys.executable}\nimport sys\nprint(repr(sys.argv[1:]), flush=True)\n")
    echo.chmod(0o755)
    arguments = ["x.yaml", *(word.replace("PWNED", str(tmp_path / "PWNED")) for word in HOSTILE)]
    settings = {**ssh, "PYTHON": str(echo), "LOGS": str(tmp_path / "lo gs"), "JOB": "j", "NCCL_DEBUG": "IN FO"}
    found = script("ssh_hostfile.sh", "start", tmp_path / "hosts", *arguments, **settings)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "asked").read_text().split() == ["n1", "n2"]
    for host in ("n1", "n2"):
        log = tmp_path / "lo gs" / "j" / f"{host}.log"
        end = time.monotonic() + 20
        while not log.is_file() or not log.read_text().endswith("\n"):
            assert time.monotonic() < end
            time.sleep(0.02)
        words = eval(log.read_text())
        assert words[words.index("train") + 1 :] == arguments
        assert f"is_host={int(host == 'n1')}" in words
    assert not (tmp_path / "PWNED").exists()


def test_status_and_stop_find_no_process_where_none_runs(tmp_path, ssh):
    (tmp_path / "hosts").write_text("n1 slots=2\n")
    folder = tmp_path / "logs" / "x"
    folder.mkdir(parents=True)
    for pid in ("", "999999999", str(os.getpid())):  # never started; ended; another program's by now
        (folder / "n1.pid").write_text(pid)
        for verb in ("status", "stop"):
            found = script("ssh_hostfile.sh", verb, tmp_path / "hosts", "x.yaml", LOGS=str(tmp_path / "logs"), **ssh)
            assert (found.stdout, found.stderr) == ("n1: stopped\n", ""), pid


def test_an_unreachable_node_is_named(tmp_path, ssh):
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 255\n")
    (tmp_path / "hosts").write_text("n1 slots=2\n")
    found = script("ssh_hostfile.sh", "start", tmp_path / "hosts", "x.yaml", **ssh)
    assert (found.returncode, found.stderr) == (15, "n1: failed: no route to host\n")


# Slurm

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$CALLS"
kill -TERM "$(cat "$STEP")"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo n7; echo n8 ;;
  *) echo "scontrol $*" >>"$CALLS" ;;
esac
"""
# stands for torchrun: saves when it is told to stop
TRAINING = """#!/usr/bin/env bash
echo "$$" >"$STEP"
echo "$*" >>"$CALLS"
trap 'echo saved >>"$CALLS"; exit 1' TERM
while :; do sleep 0.05; done
"""


@pytest.fixture
def slurm(tmp_path):
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "training": TRAINING}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    job = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_GPUS_ON_NODE": "8"}
    files = {"STEP": str(tmp_path / "step"), "CALLS": str(tmp_path / "calls"), "PYTHON": str(tmp_path / "training")}
    return {**clean, **job, **files, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def start_slurm(environment, tmp_path):
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "x.yaml", "run_dir=a b"]
    job = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not (tmp_path / "calls").is_file():
        assert time.monotonic() < end
        time.sleep(0.02)
    return job


def test_before_the_time_limit_slurms_job_saves_and_queues_itself_again(tmp_path, slurm):
    job = start_slurm(slurm, tmp_path)
    job.send_signal(10)  # USR1
    job.wait(timeout=30)
    started, *after = (tmp_path / "calls").read_text().splitlines()
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint n7:29400 --rdzv-id 42" in started
    assert "is_host=1" in started
    assert started.endswith("train x.yaml run_dir=a b")
    assert after == ["scancel --signal=TERM 42", "saved", "scontrol requeue 42"]


def test_a_preempted_job_waits_for_its_ranks_and_leaves_the_queue_to_slurm(tmp_path, slurm):
    job = start_slurm(slurm, tmp_path)
    job.terminate()
    time.sleep(0.3)
    assert job.poll() is None  # still waits
    os.kill(int(Path(slurm["STEP"]).read_text()), 15)
    job.wait(timeout=30)
    assert (tmp_path / "calls").read_text().splitlines()[1:] == ["saved"]


def test_slurms_dry_run_says_what_each_node_would_run(slurm):
    found = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "--dry-run", "x.yaml", "run_dir=a b"],
        env=slurm,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert first.startswith("NNODES=2 NPROC_PER_NODE=8 RDZV_ENDPOINT=n7:29400 RDZV_ID=42 srun ")
    assert second.endswith("-m flagscale_like train x.yaml run_dir=a\\ b ")


def test_slurm_is_asked_to_warn_in_time_and_to_requeue():
    options = [line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line]
    assert {"--requeue", "--signal=B:USR1@300", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)


def test_the_pytorchjob_is_whole_and_its_counts_agree():
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker, elastic = job["spec"]["pytorchReplicaSpecs"]["Worker"], job["spec"]["elasticPolicy"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["nprocPerNode"]
    assert (REPOSITORY / container["command"][0]).is_file()
    assert (REPOSITORY / container["args"][0]).parent.is_dir()
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun's own patience
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
