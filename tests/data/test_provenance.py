"""From a step to its documents: every token of every sample is accounted for; the records suffice for every history."""

import dataclasses
import json

import numpy as np
import pytest

from flagscale_like.data.blend import IndexCache, build_split, source_mark
from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.pretrain import check_sources
from flagscale_like.data.provenance import (
    Provenance,
    Segment,
    dp_rank_of,
    locate,
    open_order,
    positions,
    read_journal,
    read_losses,
    readings_of,
    segments_of_states,
    write_losses,
)
from flagscale_like.data.tokenizer import Tokenizer, train_bpe
from flagscale_like.errors import DataError, required
from tests.harness import tiny_config


@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    """A blend of two sources with short and long documents: (configuration, samples, texts by file and line)."""
    folder = tmp_path_factory.mktemp("provenance")
    texts = {}
    for name, words in (("a", "alpha beta "), ("b", "gamma ")):
        path = folder / f"{name}.jsonl"
        lines = [f"{name} {i} " + words * (1 + i * 13 % 70) for i in range(50)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        texts |= {(str(path), line): text for line, text in enumerate(lines, start=1)}
    tokenizer = train_bpe(texts.values(), 270, folder / "tokenizer")
    for name in "ab":
        preprocess([folder / f"{name}.jsonl"], tokenizer.folder, folder / name, shard_bytes=5000)
    sources = [{"path": str(folder / "a"), "weight": 2}, {"path": str(folder / "b")}]
    data = {"sources": sources, "tokenizer": str(tokenizer.folder)}
    config = tiny_config(folder / "run", model__vocab_size=384, data=data)
    words = required(check_sources(config), "tokenizer")
    samples = build_split(config, words, "train", 300, IndexCache(None, may_build=True))
    return config, samples, texts


def test_the_parts_of_a_sample_are_its_tokens_and_their_documents(blended):
    config, samples, texts = blended
    provenance, words = Provenance(samples, config.data.source_names), Tokenizer(config.data.tokenizer)
    for position in range(len(samples)):
        parts = provenance.parts(position)
        tokens = np.concatenate([provenance.tokens(part) for part in parts])
        assert tokens[:-1].tolist() == samples[position]["tokens"].tolist()
        assert tokens[1:].tolist() == samples[position]["labels"].tolist()
        for part in parts:
            whole = words.encode_batch([texts[part.file, part.line]])[0] + [words.eod]
            assert provenance.tokens(part).tolist() == whole[part.start : part.end]
            assert part.source == part.file[-7]
    with pytest.raises(DataError, match="sample 10000: the order has"):
        provenance.parts(10_000)


def test_a_source_without_a_table_is_named_by_document(blended, tmp_path):
    config, samples, _ = blended
    provenance = Provenance(samples, config.data.source_names)
    for table in provenance.tables:
        table.path = tmp_path / "nothing"
    part = provenance.parts(0)[0]
    assert part.file is None
    assert str(part) == f"{part.prefix} document {part.document}"


def test_a_source_that_was_made_anew_answers_for_no_step(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"alpha {i} " * 9}) + "\n" for i in range(50)))
    tokenizer = train_bpe(["alpha"], 270, tmp_path / "tokenizer")
    preprocess([tmp_path / "a.jsonl"], tokenizer.folder, tmp_path / "a")
    data = {"sources": [{"path": str(tmp_path / "a")}], "tokenizer": str(tokenizer.folder)}
    config = tiny_config(tmp_path / "run", model__vocab_size=384, data=data)
    marks = [source_mark(str(tmp_path / "a"))]
    read = Segment("start", 0, 0, 20, 1, config, marks)
    assert open_order(read).place(19)[0] == 0
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"beta {i} " * 5}) + "\n" for i in range(50)))
    preprocess([tmp_path / "a.jsonl"], tokenizer.folder, tmp_path / "a", overwrite=True)
    with pytest.raises(DataError, match="a: has changed since the run read it"):
        open_order(read)


RAMP = {"start": 4, "increment": 4, "samples": 24}  # 4 until 24 are consumed, then 8


def segment(event, step, consumed, **changes):
    config = tiny_config("run", train__ramp_up=RAMP, data={"sources": [{"path": "x"}], "tokenizer": "t"}, **changes)
    return Segment(event, step, consumed, 300, 2, config)


def read(segments, step):
    return [(r.first, r.count) for r in readings_of(segments, step)]


def test_a_ramp_up_is_followed():
    journal = [segment("start", 0, 0)]
    assert [read(journal, step) for step in (1, 6, 7, 8)] == [[(0, 4)], [(20, 4)], [(24, 8)], [(32, 8)]]


def test_a_step_that_was_made_again_after_going_back_has_both_readings():
    # steps 1 to 8, back to 6 with 40 samples consumed, on to 9, stopped, and on
    journal = [segment("start", 0, 0), segment("rewind", 6, 40), segment("start", 9, 64)]
    assert read(journal, 6) == [(20, 4)]
    assert read(journal, 7) == [(24, 8), (40, 8)]
    assert read(journal, 8) == [(32, 8), (48, 8)]
    assert read(journal, 9) == [(56, 8)]
    assert read(journal, 10) == [(64, 8)]


def test_a_killed_run_that_made_steps_again_has_one_reading_of_them():
    journal = [segment("start", 0, 0), segment("start", 6, 24), segment("start", 6, 24)]
    assert read(journal, 7) == [(24, 8)]
    assert readings_of(journal, 7)[0].segment is journal[2]


def state(of):
    layout = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 2}
    place = {"step": of.step, "consumed_samples": of.consumed, "train_samples": of.train_samples}
    return {**place, "layout": layout, "config": of.config}


def test_checkpoints_alone_suffice_also_after_going_back():
    # the checkpoint of step 6 was saved again when the run went back: 16 samples are left out
    segments = segments_of_states([state(segment("start", 8, 56)), state(segment("start", 6, 40))])
    assert read(segments, 7) == [(40, 8)]
    assert read(segments, 9) == [(56, 8)]
    with pytest.raises(DataError, match="step 3: the run's records do not say which samples it read"):
        readings_of(segments, 3)
    straight = segments_of_states([state(segment("start", 8, 40))])
    assert read(straight, 3) == [(8, 4)]
    gap = segments_of_states([state(segment("start", 6, 24)), state(segment("start", 9, 64))])
    assert read(gap, 3) == [(8, 4)]
    with pytest.raises(DataError, match="between the checkpoints of steps 6 and 9 the run rewound"):
        readings_of(gap, 7)
    with pytest.raises(DataError, match="does not say which samples were read"):
        segments_of_states([{"step": 3}])


def test_losses_come_back_by_position_and_rank_the_samples(blended, tmp_path):
    config, samples, _ = blended
    whole = Segment("start", 0, 0, 300, 4, config)
    (reading,) = readings_of([whole], 2)
    assert (reading.first, reading.count) == (8, 8)
    dp = 4
    for dp_rank in range(dp):
        for wrong in ((2, 16), (3, 8)):
            write_losses(tmp_path, dp_rank, (*wrong, dp_rank, dp, 1), [9.0, 9.0])
        found = [dp_rank + 0.5, float("nan") if dp_rank == 1 else 0.0]
        write_losses(tmp_path, dp_rank, (2, 8, dp_rank, dp, 1), found)
    with open(tmp_path / "sample_losses" / "rank_00000.jsonl", "a") as file:
        file.write('{"step": 2, "first": 8, "dp_rank": 0, "los')
    losses = read_losses(tmp_path, reading)
    assert [losses[p] for p in (8, 9, 10, 11, 12)] == [0.5, 1.5, 2.5, 3.5, 0.0]
    found = locate(tmp_path, reading, Provenance(samples, config.data.source_names))
    assert [sample.position for sample in found][:4] == [13, 11, 10, 9]
    assert [(s.dp_rank, s.micro_batch) for s in found][:2] == [(1, 1), (3, 0)]
    mine = locate(tmp_path, reading, Provenance(samples, config.data.source_names), dp_rank=3)
    assert {sample.position for sample in mine} == {11, 15}


def test_losses_are_placed_by_the_micro_batches_that_they_were_noted_of(tmp_path):
    config = tiny_config("run", data={"sources": [{"path": "x"}], "tokenizer": "t"})
    (reading,) = readings_of([Segment("start", 0, 0, 300, 1, config)], 1)
    assert config.train.micro_batch_size == 1
    for dp_rank in range(2):
        write_losses(tmp_path, dp_rank, (1, 0, dp_rank, 2, 2), [dp_rank + i / 4 for i in range(4)])
    assert [read_losses(tmp_path, reading)[i] for i in range(8)] == [0.0, 0.25, 1.0, 1.25, 0.5, 0.75, 1.5, 1.75]


def test_a_global_rank_reads_what_its_data_parallel_rank_reads():
    config = tiny_config("run", parallel={"tp": 2, "pp": 2}, data={"sources": [{"path": "x"}], "tokenizer": "t"})
    whole = Segment("start", 0, 0, 300, 8, config)
    assert [dp_rank_of(whole, rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    with pytest.raises(DataError, match="rank 8: the run had 8 ranks"):
        dp_rank_of(whole, 8)
    (reading,) = readings_of([whole], 1)
    assert sorted(position for position, *_ in positions(reading)) == list(range(8))


def test_a_journal_cut_short_is_read_to_its_last_whole_line(tmp_path):
    first = segment("start", 0, 0)
    first.append_to(tmp_path)
    dataclasses.replace(first, event="rewind", step=3).append_to(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text()[:-30])
    assert read_journal(tmp_path) == [first]
    second = dataclasses.replace(first, step=2)
    second.append_to(tmp_path)
    assert read_journal(tmp_path) == [first, second]
    assert read_journal(tmp_path / "nowhere") == []
