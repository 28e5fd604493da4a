"""A checkpoint can be used wherever it lies: its tokenizer, its generation settings and its ids go with it."""

import json
import shutil

import pytest

from flagscale_like.checkpoint.companions import Origin, Sampling, companions_at, fingerprint, read_companions
from flagscale_like.checkpoint.manifest import read_manifest, verify_files
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.errors import ConversionError
from tests.commands import run_commands
from tests.families import tiny
from tests.harness import tiny_config, write_yaml

IDS = {"bos_token_id": 1, "eos_token_id": [5, 6, 7]}
SETTINGS = {"temperature": 0.7, "top_p": 0.9, "do_sample": True, **IDS}
TEXT = "one line of text\n" * 40


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as it is published, with a tokenizer whose own end of text is another id than its settings say."""
    folder = tiny.make("qwen2", tmp_path_factory.mktemp("published"))
    config = json.loads((folder / "config.json").read_text())
    config |= {**IDS, "vocab_size": 130, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    train_bpe([TEXT], 257, folder / "tok")
    words = json.loads((folder / "tok/tokenizer.json").read_text())
    words["model"]["vocab"] = {token: i for token, i in words["model"]["vocab"].items() if i < 130}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    for name in ("tokenizer_config.json",):
        shutil.copy(folder / "tok" / name, folder / name)
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    shutil.rmtree(folder / "tok")
    return folder


def ids_of(folder):
    config, settings = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    return {name: config.get(name) for name in IDS}, settings


def test_what_is_not_a_weight_goes_through_import_training_and_export(published, tmp_path):
    """A synthetic run from a published folder: nothing but the folder says what its tokens are."""
    text = f"""
run_dir: run
train: {{steps: 2, micro_batch_size: 1, global_batch_size: 2, seq_length: 16, precision: fp32}}
optimizer: {{lr: 0.01}}
data: {{synthetic: true}}
checkpoint: {{init_from_hf: {published}, interval: 1, export_hf: true}}
"""
    (tmp_path / "run.yaml").write_text(text)
    lines = [
        ["train", "run.yaml"],
        ["convert", "import", "--hf", str(published), "--out", "native"],
        ["convert", "export", "--checkpoint", "native", "--out", "back", "--dtype", "fp32"],
    ]
    (outcomes,) = run_commands(lines, tmp_path)
    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.error
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = [
        ["convert", "export", "--checkpoint", "moved", "--out", "moved-hf", "--dtype", "fp32"],
        ["ckpt", "reshard", "moved", "--out", "resharded", "--files", "2"],
        ["convert", "export", "--checkpoint", "resharded", "--out", "resharded-hf", "--dtype", "fp32"],
    ]
    (outcomes,) = run_commands(again, tmp_path)
    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.error
    for name in ("moved/hf", "back", "moved-hf", "resharded-hf"):
        assert ids_of(tmp_path / name) == (IDS, SETTINGS), name
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.json"):
            assert (tmp_path / name / file).read_bytes() == (published / file).read_bytes(), (name, file)


def test_a_run_that_was_moved_answers_with_its_own_tokenizer(tmp_path):
    """Relative paths, another folder, the tokenizer gone: the checkpoint has what it needs, with checksums."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    tokenizer = train_bpe([TEXT], 300, folder / "tok")
    preprocess([folder / "text.txt"], tokenizer.folder, folder / "data")
    data = {"sources": [{"path": "data"}], "tokenizer": "tok", "split": "1,0,0"}
    config = tiny_config("run", model__vocab_size=384, train__steps=2, train__global_batch_size=2, data=data)
    write_yaml(config, folder / "run.yaml")
    ((trained,),) = run_commands([["train", "run.yaml"]], folder)
    assert trained.exit_code == 0, trained.error
    shutil.move(folder / "run", tmp_path / "elsewhere")
    shutil.rmtree(folder)
    words = ["generate", "--checkpoint", "elsewhere", "--prompt", "one line", "--max-new-tokens", "3"]
    export = ["convert", "export", "--checkpoint", "elsewhere", "--out", "hf", "--dtype", "fp32"]
    ((said, exported),) = run_commands([words, export], tmp_path)
    assert said.exit_code == 0, said.error
    assert said.printed.startswith("one line")
    assert exported.exit_code == 0, exported.error
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 0
    checkpoint = next((tmp_path / "elsewhere/checkpoints").glob("step_*2"))
    names = {record.name for record in read_manifest(checkpoint)}
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} <= names
    damaged = companions_at(checkpoint) / "tokenizer.json"
    damaged.write_text(damaged.read_text().replace("one", "two", 1))
    (problem,) = verify_files(checkpoint, processes=1)
    assert problem.startswith("tokenizer/tokenizer.json: checksum")


def test_a_checkpoint_without_a_tokenizer_says_where_it_was(tmp_path):
    """As an earlier version saved it: a path alone, which is not there."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    preprocess([folder / "text.txt"], train_bpe([TEXT], 300, folder / "tok").folder, folder / "data")
    data = {"sources": [{"path": "data"}], "tokenizer": "tok", "split": "1,0,0"}
    config = tiny_config("run", model__vocab_size=384, train__steps=1, optimizer__warmup_steps=0, data=data)
    write_yaml(config, folder / "run.yaml")
    run_commands([["train", "run.yaml"]], folder)
    checkpoint = next((folder / "run/checkpoints").glob("step_*"))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if "/" not in file["name"]]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(checkpoint / "tokenizer")
    export = ["convert", "export", "--checkpoint", "work/run", "--out", "hf", "--dtype", "fp32"]
    ((found, hub),) = run_commands([export, [*export[:5], "hub", "--tokenizer", "gpt2"]], tmp_path)
    assert hub.error == "error: tokenizer gpt2: no such folder"  # and no repository of a hub
    assert "the run's tokenizer was at tok, and is not there: give --tokenizer FOLDER" in found.printed


def test_settings_say_how_the_next_token_is_chosen(tmp_path):
    def read(**settings):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        return Sampling.of(tmp_path)

    assert Sampling.of(tmp_path) == Sampling()
    assert read(temperature=0.7, eos_token_id=5) == Sampling(stop=(5,))  # without do_sample, the likeliest token
    given = read(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, eos_token_id=[5, 6])
    assert given == Sampling(0.7, 0.8, 20, (5, 6), {"repetition_penalty": 1.05})
    assert read(do_sample=True, num_beams=1) == Sampling(1.0, 1.0, 50)  # transformers' defaults
    for wrong in ({"do_sample": True, "top_p": 2}, {"eos_token_id": "x"}, {"do_sample": True, "temperature": [1]}):
        with pytest.raises(ConversionError, match=r"generation_config\.json: "):
            read(**wrong)


def test_generation_settings_of_other_ids_are_left(published, tmp_path):
    other = train_bpe([TEXT], 280, tmp_path / "tok").folder
    assert "generation_config.json" in read_companions([published])
    assert set(read_companions([other, published])) == {"tokenizer.json", "tokenizer_config.json"}
    assert read_companions([None, tmp_path / "nowhere"]) == {}
    origin = Origin("x", IDS, fingerprint(published))
    assert (origin.has_tokenizer(published), origin.has_tokenizer(None)) == (True, True)
    assert not origin.has_tokenizer(other)
    assert Origin.of(origin.record()) == origin
    assert Origin.of("nonsense") == Origin.of({"token_ids": 3}) == Origin()
