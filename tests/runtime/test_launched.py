"""What the environment says of a launch: all of torchrun's variables, or none."""

from typing import Any

import pytest

from flagscale_like.config import Parallel
from flagscale_like.errors import PlatformError
from flagscale_like.runtime.launched import NAMES, current_launch
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import command
from tests.harness import cli, tiny_config, write_yaml

RANK: dict[str, Any] = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch):
    """Set torchrun's variables to these alone."""

    def give(values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


def test_a_rank_is_what_torchrun_says(environment):
    environment({})
    assert current_launch() is None
    environment({"MASTER_ADDR": "node-0", "MASTER_PORT": "1"})  # a shell that is used for several things
    assert current_launch() is None
    environment({**RANK, "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"})
    launch = current_launch()
    assert (launch.rank, launch.world_size, launch.local_rank, launch.endpoint) == (1, 2, 1, "node-0:29500")
    assert (launch.restart, launch.max_restarts) == (1, 3)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2, but no RANK or LOCAL_RANK or MASTER_ADDR"),
        ({k: v for k, v in RANK.items() if k != "LOCAL_RANK"}, "but no LOCAL_RANK: start the ranks with torchrun"),
        ({**RANK, "RANK": "one"}, "must be numbers and a host"),
        ({**RANK, "RANK": "2"}, "RANK=2 LOCAL_RANK=1 WORLD_SIZE=2: no such rank"),
    ],
)
def test_a_part_of_a_launch_is_refused(environment, values, part):
    environment(values)
    with pytest.raises(PlatformError) as error:
        current_launch()
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_an_address_that_does_not_resolve_is_told_at_once(environment):
    environment({**RANK, "MASTER_ADDR": "no-such-host.invalid"})
    with (
        pytest.raises(PlatformError, match=r"cannot meet at no-such-host.invalid:29500: .* does not resolve"),
        parallel_context(Parallel()),
    ):
        pass


def test_train_refuses_half_a_launch_and_ranks_that_would_start_ranks(tmp_path, environment):
    path = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "run.yaml")
    half = cli("train", str(path), WORLD_SIZE="2")
    assert half.returncode == PlatformError.exit_code
    assert half.stderr.startswith("error: the environment has WORLD_SIZE=2, but no RANK")
    assert not (tmp_path / "run").exists()
    environment({**RANK, "MASTER_ADDR": "127.0.0.1"})
    again = command("train", str(path), "--nproc-per-node", "2")
    assert again.returncode == 10
    assert "this process is rank 1 of 2 already: leave it out" in again.stderr
