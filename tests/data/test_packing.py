"""Packs: full rows, the same for a seed; a source of conversations in blends, provenance, splits and the index cache."""

import numpy as np
import pytest
import torch

from flagscale_like.data.batch import collate
from flagscale_like.data.best_fit import best_fit_decreasing
from flagscale_like.data.blend import IndexCache, build_split, counts_of, is_packed, source_use
from flagscale_like.data.conversations import mask_of
from flagscale_like.data.packing import pack_epochs, pack_row
from flagscale_like.data.preprocess import preprocess, preprocess_chat
from flagscale_like.data.pretrain import check_sources, prepare_once
from flagscale_like.data.provenance import Provenance
from flagscale_like.data.shards import ChatOptions
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError, required
from tests.data.chats import CHATML, MARKED, make_tokenizer, write_chats
from tests.harness import tiny_config

LENGTH = 160


def test_best_fit_decreasing_fills_bins_and_needs_as_many_for_any_order():
    draw = np.random.RandomState(0)
    lengths = draw.randint(1, 40, size=500)
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(item for members in bins for item in members) == list(range(500))
    assert max(sum(lengths[item] for item in members) for members in bins) <= 64
    assert len(bins) <= 1.05 * lengths.sum() / 64
    assert len(best_fit_decreasing(lengths[draw.permutation(500)], 64)) == len(bins)
    assert best_fit_decreasing([64, 64], 64) == [[0], [1]]


def test_epochs_have_each_conversation_once_and_follow_from_the_seed_alone():
    places = np.random.RandomState(1).randint(1, 60, size=100)
    members, starts = pack_epochs(lambda epoch: places, 64, rows=120, seed=5)
    rows = len(best_fit_decreasing(places, 64))
    assert len(starts) - 1 == -(-120 // rows) * rows
    first, second = members[: starts[rows]], members[starts[rows] : starts[2 * rows]]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()
    fewer, _ = pack_epochs(lambda epoch: places, 64, rows=1, seed=5)
    assert fewer.tolist() == first.tolist()
    assert pack_epochs(lambda epoch: places, 64, rows=1, seed=6)[0].tolist() != first.tolist()


def test_a_row_has_each_conversation_as_a_document_and_counts_nothing_of_the_rest():
    pairs = [
        (np.array([1, 2, 3]), np.array([0, 0, 1])),
        (np.array([4, 5, 6, 7]), np.array([0, 0.5, 0.25, 0.25])),
    ]
    row = pack_row(pairs, 7, pad=9)
    assert row["tokens"].tolist() == [1, 2, 4, 5, 6, 9, 9]
    assert row["labels"].tolist() == [2, 3, 5, 6, 7, 9, 9]
    assert row["loss_mask"].tolist() == [0, 1, 0.5, 0.25, 0.25, 0, 0]
    assert row["documents"].tolist() == [0, 2, 5, 7]
    assert pack_row(pairs, 5, pad=9)["documents"].tolist() == [0, 2, 5]
    halved = pack_row([(pairs[0][0], np.array([0, 2, 2]))], 2, pad=9, per_conversation=True)
    assert halved["loss_mask"].tolist() == [0.5, 0.5]
    assert halved["extras"]["conversations"].tolist() == [[1, 0]]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Two sources: 60 conversations and 40 documents of text, with the tokenizer of both."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = make_tokenizer(folder / "tok")
    write_chats(folder / "chats.jsonl", 60)
    (folder / "text.jsonl").write_text('{"text": "two and two are four, and three are five"}\n' * 40)
    preprocess_chat([folder / "chats.jsonl"], tokenizer, folder / "chats", ChatOptions(CHATML))
    preprocess([folder / "text.jsonl"], tokenizer, folder / "text")
    return folder


def chat_config(run_dir, chats, *, names=("chats",), **changes):
    data = {
        "sources": [{"path": str(chats / name)} for name in names],
        "tokenizer": str(chats / "tok"),
        "split": "80,20,0",
        **changes.pop("data", {}),
    }
    changes = {"train__seq_length": LENGTH, "model__vocab_size": 300, **changes}
    return tiny_config(run_dir, data=data, **changes)


def in_memory(config, split="train", samples=40):
    return build_split(
        config, required(check_sources(config), "tokenizer"), split, samples, IndexCache(None, may_build=True)
    )


def test_the_parts_of_a_row_are_its_conversations_and_lead_to_their_lines(chats, tmp_path):
    config = chat_config(tmp_path, chats)
    rows = in_memory(config)
    assert is_packed(rows)
    provenance = Provenance(rows, config.data.source_names)
    for position in range(len(rows)):
        row, parts = rows[position], provenance.parts(position)
        bounds = row["documents"].tolist()
        assert len(bounds) - 1 in (len(parts), len(parts) + 1)
        for part, start, stop in zip(parts, bounds, bounds[1:], strict=False):
            ids = provenance.tokens(part)
            assert row["tokens"][start:stop].tolist() == ids[:-1].tolist()
            assert row["labels"][start:stop].tolist() == ids[1:].tolist()
            assert part.line == part.document + 1
        assert row["loss_mask"][bounds[len(parts)] :].count_nonzero() == 0


def test_the_splits_share_no_conversation_and_an_epoch_is_counted(chats, tmp_path):
    config = chat_config(tmp_path, chats)
    train, valid = in_memory(config), in_memory(config, "valid", 4)
    assert {number for row in range(len(train)) for number in train.members_of(row)} == set(range(48))
    assert {number for row in range(len(valid)) for number in valid.members_of(row)} == set(range(48, 60))
    once = len(in_memory(config, samples=1))
    (use,) = source_use(train.parts, ["chats"], [2 * once])
    assert use.epochs == 2.0


def test_conversations_and_text_are_blended_and_collated(chats, tmp_path):
    config = chat_config(tmp_path, chats, names=("chats", "text"))
    rows = in_memory(config)
    assert counts_of(rows, 40) == [20, 20]
    batch = collate([rows[position] for position in range(4)])
    assert batch["tokens"].shape == (4, LENGTH)
    bounds = batch["documents"].tolist()
    assert set(range(0, 5 * LENGTH, LENGTH)) <= set(bounds)
    assert batch["dataset_id"].tolist().count(0) == 2
    parts = Provenance(rows, config.data.source_names)
    assert {parts.parts(position)[0].source for position in range(4)} == {"chats", "text"}


def test_per_conversation_each_has_the_same_weight(chats, tmp_path):
    config = chat_config(
        tmp_path, chats, names=("chats", "text"), objective={"kind": "next_token", "per": "conversation"}
    )
    rows = in_memory(config)
    for position in range(6):
        row = rows[position]
        conversations = len(Provenance(rows, ["a", "b"]).parts(position)) if "documents" in row else 1
        assert row["loss_mask"].sum().item() == pytest.approx(conversations, abs=1e-5)
        assert row["extras"]["conversations"].sum().item() == conversations


def test_the_packs_are_cached_and_follow_their_source(chats, tmp_path):
    config = chat_config(tmp_path, chats)
    tokenizer = required(check_sources(config), "tokenizer")
    build_split(config, tokenizer, "train", 40, IndexCache(tmp_path / "index", may_build=True))
    made = {path.name for path in (tmp_path / "index").iterdir()}
    assert {name.rpartition("-")[2] for name in made} == {"conversation.npy", "row.npy"}
    again = build_split(config, tokenizer, "train", 40, IndexCache(tmp_path / "index", may_build=False))
    assert torch.equal(again[3]["tokens"], in_memory(config)[3]["tokens"])


def break_source(chats, target, how):
    for path in chats.glob("chats.*"):
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    prefix = str(target / "chats")
    if how == "other weights":
        preprocess_chat(
            [chats / "chats.jsonl"], chats / "tok", target / "y", ChatOptions(CHATML, length=60, long="cut")
        )
        for suffix in (".bin", ".idx"):
            (target / f"chats.mask{suffix}").write_bytes((target / f"y.mask{suffix}").read_bytes())
    elif how == "no weights":
        (target / "chats.mask.idx").unlink()
    elif how == "other template":
        (target / "chats.chat.json").write_text((target / "chats.chat.json").read_text().replace("im_end", "end"))
    elif how == "truncated record":
        (target / "chats.chat.json").write_text("{")
    return prefix


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("other weights", "chats.mask has"),
        ("no weights", "holds conversations, but"),
        ("other template", "are rendered with another chat template than data.tokenizer"),
        ("truncated record", "chats.chat.json: cannot be read"),
        ("short rows", "take more than train.seq_length (32): set seq_length to"),
        ("small model", "has 300 ids, model.vocab_size is 200"),
    ],
)
def test_a_source_that_does_not_fit_the_run_is_refused_before_training(chats, tmp_path, how, part):
    prefix = break_source(chats, tmp_path, how)
    changes = {"short rows": {"train__seq_length": 32}, "small model": {"model__vocab_size": 200}}.get(how, {})
    config = chat_config(tmp_path, chats, data={"sources": [{"path": prefix}]}, **changes)
    with pytest.raises(DataError) as error:
        check_sources(config)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_raw_conversations_are_prepared_once_and_another_template_is_noticed(chats, tmp_path):
    (tmp_path / "marked.jinja").write_text(MARKED)
    prepare = {"input": [str(chats / "chats.jsonl")], "chat": {"template": str(tmp_path / "marked.jinja")}}
    data = {"prepare": prepare, "tokenizer": str(chats / "tok"), "sources": []}
    config = chat_config(tmp_path / "run", chats, data=data)
    prepared = prepare_once(config)
    assert prepared.data.tokenizer == str(tmp_path / "run" / "data" / "chat-tokenizer")
    check_sources(prepared)
    assert prepare_once(config) == prepared
    other = {**data, "prepare": {**prepare, "chat": {"train": "last"}}}
    with pytest.raises(DataError, match=r"was written with another data.prepare.chat: remove"):
        prepare_once(chat_config(tmp_path / "run", chats, data=other))
    assert Tokenizer(prepared.data.tokenizer).vocab_size == 300
    assert mask_of("a") == "a.mask"
