"""Configuration: what is accepted, and one line for each thing that is not."""

import pytest
import yaml

from flagscale_like.config import RunConfig, load_config
from flagscale_like.errors import ConfigError
from tests.harness import cli, tiny_config, write_yaml


def broken(tmp_path, changes=(), text=None):
    """The message that a changed configuration is refused with."""
    path = tmp_path / "run.yaml"
    write_yaml(tiny_config(tmp_path / "run"), path)
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, changes)
    return str(error.value)


WRONG = {
    "unknown key": (["train.micro_batch_sise=1"], "did you mean 'micro_batch_size'?"),
    "wrong type": (["train.steps=many"], "train.steps"),
    "a float where an integer belongs": (["model.num_layers=2.5"], "model.num_layers"),
    "negative number": (["train.micro_batch_size=-1"], "greater than 0 (got -1)"),
    "zero": (["parallel.tp=0"], "greater than 0 (got 0)"),
    "missing": (["train=null"], "train"),
    "true as a number": (["train.steps=yes"], "train.steps: Input should be a valid integer"),
    "true as a fraction": (["optimizer.lr=true"], "optimizer.lr: Input should be a valid number"),
    "more samples than can be counted": (["train.steps=99999999999999999999"], "less than or equal to 1000000000000"),
    "a seed that no generator takes": (["train.seed=99999999999999999999"], "train.seed: Input should be less than"),
    "an empty path": (["run_dir=''"], "run_dir: is empty: write a path"),
    "a key twice in an override": (["data.sources=[{path: x, path: y}]"], "path is given twice"),
    "heads % tp": (
        ["parallel.tp=3"],
        "num_attention_heads (4) must be divisible by parallel.tp (3): tp 2 or 4 would do",
    ),
    "groups % tp": (
        ["parallel.tp=6", "model.num_attention_heads=12", "model.head_dim=8", "model.num_query_groups=4"],
        "num_query_groups (4) must be divisible by parallel.tp (6), or divide it: tp 4 would do",
    ),
    "rows of q, k, v % tp": (
        ["parallel.tp=16", "model.num_attention_heads=16", "model.head_dim=2", "model.num_query_groups=1"],
        "the 36 rows of q, k and v must be divisible by parallel.tp (16): tp 4 would do",
    ),
    "ffn % tp": (["parallel.tp=2", "model.ffn_hidden_size=97"], "ffn_hidden_size (97) must be divisible"),
    "heads % groups": (
        ["model.num_query_groups=3"],
        "num_attention_heads (4) must be divisible by num_query_groups (3)",
    ),
    "hidden % heads": (
        ["model.num_attention_heads=6", "model.head_dim=0"],
        "hidden_size (64) must be divisible by num_attention_heads (6)",
    ),
    "sequence % 2 cp": (
        ["parallel.cp=3"],
        "train.seq_length (32) must be divisible by 2 * parallel.cp (3): seq_length 30 or 36 would do",
    ),
    "sequence % 2 cp tp": (
        ["parallel.cp=3", "parallel.tp=2", "parallel.sp=true"],
        "must be divisible by 2 * parallel.cp (3) * parallel.tp (2) with sp: seq_length 24 or 36 would do",
    ),
    "groups % cp": (
        ["parallel.cp=4", "parallel.cp_kind=a2a"],
        "model.num_query_groups / parallel.tp (2/1) must be divisible by parallel.cp (4) with cp_kind a2a: cp 2 would do, "
        "or cp_kind gather",
    ),
    "layers % pp": (["parallel.pp=3"], "num_layers (4) must be divisible by pp*vpp (3*1): pp 2 or 4 would do"),
    "layers % pp*vpp": (
        ["parallel.pp=4", "parallel.vpp=2"],
        "num_layers (4) must be divisible by pp*vpp (4*2): pp 2 would do",
    ),
    "uneven stages": (
        ["parallel.pp=4", "parallel.first_stage_layers=2"],
        "less first_stage_layers (2) and last_stage_layers (0) must be divisible by the other stages (3)",
    ),
    "sp without tp": (["parallel.sp=true"], "needs tp > 1 (tp is 1)"),
    "seq % tp under sp": (["parallel.tp=2", "parallel.sp=true", "train.seq_length=33"], "seq_length (33)"),
    "vpp without pp": (["parallel.vpp=2"], "vpp (2) needs pp > 1"),
    "batch % micro": (
        ["train.micro_batch_size=3"],
        "(8) must be divisible by train.micro_batch_size (3): micro_batch_size 2 or 4 would do",
    ),
    "warm-up too long": (["optimizer.warmup_steps=6"], "warmup_steps (6) must be less than train.steps (6)"),
    "min_lr over lr": (["optimizer.min_lr=1"], "min_lr (1.0) must not exceed lr (0.01)"),
    "wsd without decay": (["optimizer.schedule=wsd"], "wsd needs optimizer.decay_steps"),
    "no data": (["data.synthetic=false"], "exactly one of sources, prepare, synthetic and prompts (0 given)"),
    "data twice": (["data.sources=[{path: x}]"], "exactly one of sources, prepare, synthetic and prompts (2 given)"),
    "bad split": (["data.split='90'"], "split must be three shares"),
    "split of NaN": (["data.split='nan,1,1'"], "split must be three shares"),
    "endless weight": (
        ["data.synthetic=false", "data.sources=[{path: x, weight: .inf}]", "data.tokenizer=x"],
        "should be a finite number",
    ),
    "source twice": (
        ["data.synthetic=false", "data.sources=[{path: x}, {path: y}, {path: x}]", "data.tokenizer=x"],
        "sources lists x twice: list it once",
    ),
    "bad override": (["train.steps"], "write it as key.path=value"),
    "override of a value as a group": (["train.steps.x=1"], "steps is not a group"),
    "selection of one source": (
        ["data.synthetic=false", "data.sources=[{path: x}]", "data.tokenizer=x", "data.selection={}"],
        "selection needs two or more sources to choose from (1 given)",
    ),
    "selection with workers": (
        [
            "data.synthetic=false",
            "data.sources=[{path: x}, {path: y}]",
            "data.tokenizer=x",
            "data.selection={}",
            "data.num_workers=2",
        ],
        "selection needs num_workers 0 (2 given)",
    ),
    "a target without its rule": (
        [
            "data.synthetic=false",
            "data.sources=[{path: x}, {path: y}]",
            "data.tokenizer=x",
            "data.selection={target: z}",
        ],
        "selection.target belongs to selection.rule target (rule progress, target z)",
    ),
    "salience of frozen weights": (
        ["init.salience={}", "train.frozen=['*.mlp.*']"],
        "init.salience scales weights by their gradients: train.frozen must be empty with it",
    ),
    "mup of tied embeddings": (
        ["model.tie_embeddings=true", "init.mup={base_hidden_size: 16}"],
        "init.mup needs model.tie_embeddings false",
    ),
    "an unknown action": (["monitors.loss={action: panic}"], "monitors.loss.action"),
    "a source's file": (
        ["data.synthetic=false", "data.sources=[{path: d/x.bin}]", "data.tokenizer=x"],
        "named without the suffix: d/x",
    ),
    "a variable that is not set": (["run_dir=$NO_SUCH_NAME/run"], "names $NO_SUCH_NAME, which is not set"),
    "nobody's home": (["run_dir=~no_such_user/run"], "there is no such user's home folder"),
    "a huge micro-batch": (["train.micro_batch_size=100000000"], "micro_batch_size 8 would do"),
    "deep brackets": (["train.frozen=" + "[" * 3000], "its brackets are nested too deeply"),
    "longer than positions": (["model.max_position_embeddings=16"], "seq_length (32) exceeds"),
    "longer than scaled positions": (
        ["model.max_position_embeddings=8", "model.position.scaling={kind: linear, factor: 2}"],
        "seq_length (32) exceeds model.max_position_embeddings (8), 16 with model.position.scaling",
    ),
    "a scaling's missing length": (
        ["model.position.scaling={kind: yarn, factor: 2}"],
        "scaling of kind yarn needs original_max_position_embeddings",
    ),
    "a number of another scaling": (
        ["model.position.scaling={kind: linear, factor: 2, beta_fast: 8}"],
        "beta_fast (8.0) belongs to scaling of kind yarn (it is linear)",
    ),
    "frequency factors the wrong way": (
        ["model.position.scaling={kind: llama3, factor: 8, low_freq_factor: 4}"],
        "low_freq_factor (4.0) must be less than high_freq_factor (4.0)",
    ),
    "a context of no tokens": (
        ["model.position.scaling={kind: llama3, factor: 8, original_max_position_embeddings: 0}"],
        "original_max_position_embeddings: Input should be greater than 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_in_one_line(name, tmp_path):
    changes, part = WRONG[name]
    message = broken(tmp_path, changes)
    assert part in message
    assert len(message.splitlines()) == 1, message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "must be a mapping of keys to values, found list"),
        ("a: [1,\nb: 2", "run.yaml:2: not valid YAML"),
        ("x: !!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
        ("", "must be a mapping of keys to values, found NoneType"),
        ("x: " + "[" * 5000, "its brackets are nested too deeply"),
        ("run_dir: a\ntrain: {}\ntrain: {}\n", "run.yaml:3: train is given twice, here and in line 2: keep one"),
        ("data:\n  sources:\n  - path: a\n    path: b\n", "run.yaml:4: path is given twice, here and in line 3"),
        ("run_dir: x\nmodel:\n", "model: is empty: give its keys, or leave it out"),
    ],
)
def test_a_yaml_that_is_no_configuration_is_refused(tmp_path, text, part):
    assert part in broken(tmp_path, text=text)
    assert not (tmp_path / "pwned").exists()


def test_an_error_names_file_and_line(tmp_path):
    path = write_yaml(tiny_config(tmp_path), tmp_path / "run.yaml")
    lines = path.read_text().replace("steps: 6", "steps: 0").splitlines()
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=rf"run.yaml:{lines.index('  steps: 0') + 1}: train.steps"):
        load_config(path)


def test_all_errors_are_told_at_once(tmp_path):
    assert len(broken(tmp_path, ["train.steps=0", "optimizer.lr=-1", "model.layers=3"]).splitlines()) == 3


def test_a_value_of_several_types_is_told_what_each_would_be(tmp_path):
    both = broken(tmp_path, ["data.synthetic=maybe"]).splitlines()
    assert ["data.synthetic: Input should be" in line for line in both] == [True, True]


@pytest.mark.parametrize(
    ("world", "changes", "part"),
    [
        (3, {"parallel__tp": 2}, "world size (3) must be divisible by tp*pp*cp (2*1*1): start 2 or 4 processes"),
        (3, {}, "global_batch_size (8) must be divisible by micro_batch_size*dp (1*3): 6 or 9 would do"),
        (4, {"parallel": {"pp": 4, "vpp": 1}, "train__global_batch_size": 7}, None),
        (
            2,
            {"parallel": {"pp": 2, "vpp": 2}, "train__global_batch_size": 3},
            "must be a multiple of pp (2) with vpp (2)",
        ),
        (1, {"train__ramp_up": {"start": 16, "increment": 4, "samples": 10}}, "ramp_up.start (16) exceeds"),
        (
            1,
            {"train__ramp_up": {"start": 2, "increment": 4, "samples": 10}},
            "must be divisible by train.ramp_up.increment",
        ),
    ],
)
def test_a_layout_is_checked_against_the_world_size(tmp_path, world, changes, part):
    config = tiny_config(tmp_path, **changes)
    if part is None:
        assert config.data_parallel_size(world) == world // config.parallel.model_parallel_size
        return
    with pytest.raises(ConfigError) as error:
        config.data_parallel_size(world)
    assert part in str(error.value)


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    config = tiny_config(
        tmp_path, parallel={"tp": 2, "sp": True}, train__ramp_up={"start": 2, "increment": 2, "samples": 9}
    )
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_ramp_up_grows_the_batch_by_equal_stretches_of_samples(tmp_path):
    train = tiny_config(tmp_path, train__ramp_up={"start": 2, "increment": 2, "samples": 30}, train__steps=20).train
    sizes, consumed = [], 0
    for _ in range(train.steps):
        sizes.append(train.batch_size_at(consumed))
        consumed += sizes[-1]
    assert sizes == sorted(sizes)
    assert set(sizes) == {2, 4, 6, 8}
    assert sum(s for s in sizes if s == 2) == 10  # 30 samples in three stretches
    assert train.total_samples() == consumed


def test_a_long_ramp_up_is_computed_and_not_walked(tmp_path):
    ramp = {"start": 2, "increment": 2, "samples": 10**12}
    train = tiny_config(tmp_path, train__ramp_up=ramp, train__steps=10**12).train
    assert train.consumed_after(0, 3) == 6
    # Each third of the samples has one size; what is left of the steps has the last.
    steps = [-(-(10**12) // 3 // size) for size in (2, 4, 6)]
    assert train.total_samples() == pytest.approx(10**12 + (10**12 - sum(steps)) * 8, rel=1e-9)


def test_whole_numbers_may_be_written_as_floats_or_text(tmp_path):
    changes = {"model__hidden_size": 64.0, "model__num_attention_heads": "4"}
    assert tiny_config(tmp_path, **changes).model == tiny_config(tmp_path).model


def test_an_empty_model_is_the_one_of_the_folder_that_the_weights_come_from(tmp_path):
    path = write_yaml(tiny_config(tmp_path), tmp_path / "run.yaml")
    text = path.read_text()
    model = yaml.safe_load(text)["model"]
    values = {key: value for key, value in yaml.safe_load(text).items() if key != "model"}
    path.write_text(yaml.safe_dump(values) + "model:\n")
    assert load_config(path, (), lambda values: model) == tiny_config(tmp_path)


def test_paths_are_expanded_as_a_shell_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", "deep/corpus")
    sources = [{"path": "${CORPUS}/text"}]
    data = {"data": {"sources": sources, "tokenizer": "$CORPUS/tok", "cache_dir": "~/cache"}}
    config = tiny_config("~/run", **data)
    assert config.run_dir == f"{tmp_path}/run"
    assert config.data.sources[0].path == "deep/corpus/text"
    assert (config.data.tokenizer, config.data.cache_dir) == ("deep/corpus/tok", f"{tmp_path}/cache")


def test_the_command_line_ends_with_the_code_of_the_error_and_no_traceback(tmp_path):
    path = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "run.yaml")
    result = cli("train", str(path), "train.stepz=5")
    assert result.returncode == ConfigError.exit_code == 10
    assert result.stderr.strip() == f"error: {path}: train.stepz: unknown key, did you mean 'steps'?".replace(
        f"{path}:", f"{path}:{path.read_text().splitlines().index('train:') + 1}:"
    )
    assert "Traceback" not in result.stderr


def test_a_group_that_a_run_does_not_have_is_named_where_it_is_asked_for(tmp_path):
    with pytest.raises(AssertionError, match="the group rl is missing"):
        _ = tiny_config(tmp_path).required_rl
