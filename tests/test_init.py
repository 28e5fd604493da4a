"""`init`: what it leaves. tests/docs/test_commands.py trains it."""

import pytest
from typer.testing import CliRunner

from flagscale_like.cli import app
from flagscale_like.config import load_config
from flagscale_like.data.readers import find_inputs
from flagscale_like.errors import ConfigError


def init(folder):
    result = CliRunner().invoke(app, ["init", str(folder)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_init_makes_a_configuration_that_is_valid_and_text_that_it_names(tmp_path, monkeypatch):
    printed = init(tmp_path / "first")
    assert printed.endswith(f"next: cd {tmp_path}/first && flagscale-like train run.yaml\n")
    monkeypatch.chdir(tmp_path / "first")
    config = load_config("run.yaml")
    assert config.parallel.model_parallel_size == 1
    for tp, pp in ((2, 1), (1, 4), (2, 2)):  # what its first lines, and the quickstart, do with it
        load_config("run.yaml", [f"parallel.tp={tp}", f"parallel.pp={pp}"])
    files = find_inputs(config.data.prepare.input)
    shares = [float(share) for share in config.data.split.split(",")]
    assert round(len(files) * shares[0] / sum(shares)) < len(files)  # a document is left for validation


def test_init_writes_over_nothing(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        init(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        init(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
