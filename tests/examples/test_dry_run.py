"""Every example YAML at the world size it is written for: its own first comment says the command."""

import json
import re
import shlex

import pytest
from typer.testing import CliRunner

from flagscale_like.arch import ModelArch
from flagscale_like.cli import app
from flagscale_like.config import load_config
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.families import find_family
from tests.harness import REPOSITORY

EXAMPLES = {
    str(path.relative_to(REPOSITORY / "examples")): path
    for path in sorted((REPOSITORY / "examples").rglob("*.yaml"))
    if path.parent.name != "slices"  # benchmarks of a few layers
}
# Of the published models: Baichuan's and Aquila2's model cards (Aquila2 rounded), and the sums of the others' safetensors.
PARAMETERS = {
    "aquila2/7b.yaml": pytest.approx(7.296e9, rel=1e-3),
    "aquila2/34b.yaml": pytest.approx(33.69e9, rel=1e-3),
    "aquila2/70b.yaml": pytest.approx(70.09e9, rel=1e-3),
    "baichuan/7b.yaml": 7_000_559_616,
    "baichuan/13b.yaml": 13_264_901_120,
    "baichuan/baichuan2-7b.yaml": 7_505_973_248,
    "baichuan/baichuan2-13b.yaml": 13_896_668_160,
    "lora/baichuan2-7b.yaml": 7_505_973_248,
    "llama3/8b.yaml": 8_030_261_248,
    "llama3/405b.yaml": 405_853_388_800,
    "qwen/qwen2.5-7b.yaml": 7_615_616_512,
    "qwen/qwen3-8b.yaml": 8_190_735_360,
    "moe/mixtral-8x7b.yaml": 46_702_792_704,
    "moe/qwen3-30b-a3b.yaml": 30_532_122_624,
}
# Published training schemes: devices, tp, pp, dp, micro and global batch, samples.
AQUILA2 = {
    "aquila2/7b.yaml": (96, 1, 1, 96, 2, 1728, 1_002_539_063),
    "aquila2/34b.yaml": (512, 4, 4, 32, 1, 1024, 488_281_250),
    "aquila2/70b.yaml": (768, 8, 4, 24, 2, 1056, 488_281_250),
}
SMOLLM2 = {
    "num_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_query_groups": 3,
    "ffn_hidden_size": 1536,
    "vocab_size": 49152,
    "tie_embeddings": True,
    "max_position_embeddings": 8192,
}


def command_of(path):
    """The arguments of the first command with --dry-run in the YAML's comments."""
    commands = re.findall(r"^#\s+flagscale-like (train .*--dry-run.*)$", path.read_text(), re.MULTILINE)
    assert commands, f"{path} says no --dry-run command"
    return shlex.split(commands[0])


def run(*arguments):
    found = CliRunner().invoke(app, arguments)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_valid_at_its_real_world_size(name, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    arguments = command_of(EXAMPLES[name])
    assert arguments[1] == f"examples/{name}"
    more = []
    if name.startswith("smollm2/"):  # its shape comes with the weights, which are not here
        config = find_family("llama").hf_config(ModelArch.model_validate(SMOLLM2))
        (tmp_path / "config.json").write_text(json.dumps(config))
        more = ["checkpoint.load=null", f"checkpoint.init_from_hf={tmp_path}"]
    if name.startswith("lora/"):  # the same of a base
        model = load_config(EXAMPLES[name]).model
        (tmp_path / "config.json").write_text(json.dumps(find_family(model.family).hf_config(model)))
        more = [f"checkpoint.init_from_hf={tmp_path}"]
    printed = run(*arguments[:2], *more, *arguments[2:])
    assert printed.endswith("the configuration is valid\n")
    world = arguments[arguments.index("--world-size") + 1]
    assert f"layout       {world} ranks" in printed
    if "--cluster" in arguments:
        assert "MFU" in printed
        nodes, devices, _ = arguments[arguments.index("--cluster") + 1].split("x")
        assert int(nodes) * int(devices) == int(world)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_models_have_their_published_sizes(name):
    assert load_config(EXAMPLES[name]).model.parameter_count() == PARAMETERS[name]


@pytest.mark.parametrize("name", AQUILA2)
def test_aquila2_is_trained_as_published(name):
    devices, tp, pp, dp, micro, batch, samples = AQUILA2[name]
    config = load_config(EXAMPLES[name])
    assert (config.parallel.tp, config.parallel.pp, config.data_parallel_size(devices)) == (tp, pp, dp)
    assert config.parallel.sp == (tp > 1)
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (micro, batch)
    assert 0 <= config.train.total_samples() - samples < batch or 0 <= samples - config.train.total_samples() < batch


def test_a_dry_run_for_this_machine_wants_the_data_and_one_for_others_says_it_did_not_look(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    name = "examples/aquila2/7b.yaml"
    there = run("train", name, "--dry-run", "--world-size", "96")
    assert "data         not checked: tokenizer tokenizers/aquila2: no such folder" in there
    with pytest.raises(DataError, match="tokenizers/aquila2: no such folder"):
        run("train", name, "--dry-run", "--world-size", "1")


def test_a_layout_too_big_for_its_devices_is_refused(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    arguments = ["examples/aquila2/70b.yaml", "parallel.tp=4", "parallel.pp=1", "--dry-run"]
    with pytest.raises(ConfigError, match="flagscale-like plan"):
        run("train", *arguments, "--world-size", "96", "--cluster", "12x8xA800")
