"""Sampler and datasets: the order depends on the consumed samples alone; bad sources are named before training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flagscale_like.data.inputs import ProgressLines
from flagscale_like.data.pretrain import build_datasets, check_sources, micro_batches, prepare_once
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.errors import DataError, required
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import cli, run_ranks, tiny_config, write_yaml


def samples(consumed, micro, dp, count):
    """The first `count` samples after `consumed`, as dp ranks read them, in the order of global batches."""
    ranks = [iter(MicroBatchSampler(1000, consumed, micro, rank, dp)) for rank in range(dp)]
    found = []
    while len(found) < count:
        for rank in ranks:
            found += next(rank)
    return found


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4)])
def test_every_data_parallel_size_reads_the_same_samples(micro, dp):
    assert samples(24, micro, dp, 64) == list(range(24, 88))


def test_the_sampler_stops_before_an_incomplete_turn():
    sampler = MicroBatchSampler(10, 0, 2, 1, 2)
    assert len(sampler) == 2
    assert [list(b) for b in sampler] == [[2, 3], [6, 7]]


def corpus_config(run_dir, corpus, **changes):
    sources = [{"path": str(corpus / "a"), "weight": 0.7}, {"path": str(corpus / "b"), "weight": 0.3}]
    data = {"sources": sources, "tokenizer": str(corpus / "tokenizer"), **changes.pop("data", {})}
    return tiny_config(run_dir, model__vocab_size=384, data=data, **changes)


def read_tokens(config, consumed: int, count: int) -> np.ndarray:
    """Tokens of this rank's next micro-batches, [count, s]."""
    with parallel_context(config.parallel) as ctx:
        data, valid = build_datasets(config, ctx, train_samples=96, valid_samples=8)
        assert len(required(valid, "validation data")) >= 8
        stream = micro_batches(data, config, ctx, consumed=consumed)
        return torch.cat([next(stream).tokens for _ in range(count)]).numpy()


def test_a_blend_reads_on_from_the_consumed_samples_on_any_data_parallel_size(tmp_path, corpus):
    config = corpus_config(tmp_path, corpus)
    (whole,) = run_ranks(1, read_tokens, config, 0, 16)
    first, second = run_ranks(2, read_tokens, config, 8, 4)
    interleaved = np.stack((first, second), axis=1).reshape(8, -1)
    assert np.array_equal(interleaved, whole[8:16])


def test_raw_text_is_prepared_once_under_the_run_folder(tmp_path, corpus):
    data = {"prepare": {"input": [str(corpus / "*.jsonl")], "tokenizer_vocab_size": 280}}
    config = tiny_config(tmp_path / "run", model__vocab_size=384, data=data)
    prepared = prepare_once(config)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "data").rglob("*") if p.is_file()}
    assert Path(prepared.data.sources[0].path + ".idx") in made
    assert prepare_once(config) == prepared
    assert {p: p.stat().st_mtime_ns for p in made} == made
    data["prepare"]["tokenizer_vocab_size"] = 290
    with pytest.raises(DataError, match=r"was trained for another number of entries than .* \(290\)"):
        prepare_once(tiny_config(tmp_path / "run", model__vocab_size=384, data=data))


def test_a_start_says_what_it_prepares_and_what_has_changed_since(tmp_path):
    folder, said = tmp_path / "text", []
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"{name}: some words of a text\n" * 30)
    data = {"prepare": {"input": [str(folder)], "tokenizer_vocab_size": 280}}
    config = tiny_config(tmp_path / "run", model__vocab_size=384, data=data)
    prepare_once(config, 1, said.append)
    assert said[0].startswith("preparing data: 3 files, 0.0 MB, to ")
    assert said[1] == "preparing data: training a tokenizer of 280 entries"
    assert said[-1].startswith("prepared 3 documents, ")
    said.clear()
    prepare_once(config, 1, said.append)
    assert said == []
    (folder / "d.txt").write_text("a file that came later")
    (folder / "a.txt").write_text("shorter")
    (folder / "b.txt").unlink()
    prepare_once(config, 1, said.append)
    (line,) = said
    assert f"1 new ({folder}/d.txt), 1 gone ({folder}/b.txt), 1 changed ({folder}/a.txt)" in line
    for path in folder.iterdir():
        path.unlink()
    assert prepare_once(config, 1, said.append).data.sources
    assert "matches no file" in said[-1]


def test_progress_is_said_once_in_a_while(monkeypatch):
    said, clock = [], [0.0]
    monkeypatch.setattr("flagscale_like.data.inputs.time.monotonic", lambda: clock[0])
    lines = ProgressLines(40_000_000, said.append)
    for clock[0] in (1.0, 9.0, 11.0, 12.0, 25.0):
        lines(5_000_000)
    assert said == ["tokenized 15.0 of 40.0 MB", "tokenized 25.0 of 40.0 MB"]


def break_source(corpus, target, how):
    for suffix in (".bin", ".idx"):
        (target / f"a{suffix}").write_bytes((corpus / f"a{suffix}").read_bytes())
    if how == "missing":
        (target / "a.idx").unlink()
    elif how == "foreign":
        (target / "a.idx").write_bytes(b"something else entirely, not an index at all")
    elif how == "truncated index":
        data = (target / "a.idx").read_bytes()
        (target / "a.idx").write_bytes(data[: len(data) // 2])
    elif how == "truncated tokens":
        data = (target / "a.bin").read_bytes()
        (target / "a.bin").write_bytes(data[:-8])


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("missing", "a.idx is missing"),
        ("foreign", "not a megatron index"),
        ("truncated index", "its header describes"),
        ("truncated tokens", "its .idx describes"),
    ],
)
def test_a_broken_source_is_named_before_training_on_every_layout(tmp_path, corpus, how, part):
    break_source(corpus, tmp_path, how)
    data = {"sources": [{"path": str(tmp_path / "a")}]}
    path = write_yaml(corpus_config(tmp_path / "run", corpus, data=data), tmp_path / "run.yaml")
    result = cli("train", str(path), "--nproc-per-node", "2" if how == "foreign" else "1")
    assert result.returncode == DataError.exit_code
    assert part in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, corpus):
    config = corpus_config(tmp_path, corpus)
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 200})})
    with pytest.raises(DataError, match="has 280 ids, model.vocab_size is 200"):
        check_sources(small)


def test_a_split_without_documents_is_refused(tmp_path, corpus):
    config = corpus_config(tmp_path, corpus, data={"split": "999,1,0"}, train__eval_interval=1)
    with pytest.raises(DataError, match="leaves 0 of its 60 documents for validation: give it a larger share"):
        check_sources(config)
    check_sources(corpus_config(tmp_path, corpus, data={"split": "999,1,0"}))
