"""Groups of a query and its passages: which lines are read, what is counted and refused, and which texts a row has."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.blend import IndexCache, build_split
from flagscale_like.data.group_shards import (
    EMPTY,
    NO_NEGATIVES,
    PASSAGES_CUT,
    POSITIVE_TOO,
    QUERIES_CUT,
    REPEATED,
    SCORED,
    TOO_FEW,
    parse_group,
)
from flagscale_like.data.group_source import pack_texts
from flagscale_like.data.groups import GroupTable, check_groups, groups_at, keys_of, notes_on_groups
from flagscale_like.data.index_file import read_lengths, read_tokens
from flagscale_like.data.preprocess import preprocess, preprocess_chat, preprocess_groups
from flagscale_like.data.pretrain import check_sources
from flagscale_like.data.provenance import Provenance
from flagscale_like.data.shards import ChatOptions, GroupOptions
from flagscale_like.data.texts import TextEncoder
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError, required
from flagscale_like.training.changes import describe_changes
from tests.commands import invoke
from tests.data.chats import CHATML, make_tokenizer
from tests.data.groups import write_groups
from tests.data.pairs import write_pairs
from tests.harness import tiny_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tok"))


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def convert(folder, tokenizer, *records, end=False, **options):
    """The report, and the texts of each group of the output: [query, positives and negatives]."""
    path = write(folder / "in.jsonl", *records)
    prefix = folder / "out"
    report, own = preprocess_groups([path], tokenizer, prefix, GroupOptions(**options), end=end, overwrite=True)
    words, table = Tokenizer(own), GroupTable(prefix)
    texts = [
        words.decode(read_tokens(str(prefix), table.lengths, n).tolist(), special=True)
        for n in range(len(table.lengths))
    ]
    starts = [*table.queries.tolist(), len(texts)]
    return report, [texts[first:last] for first, last in zip(starts[:-1], starts[1:], strict=True)]


def test_texts_are_stripped_and_have_the_instruction_of_their_line_or_source(tokenizer, tmp_path):
    records = [
        {"query": " a ", "pos": "b\n", "neg": ["c"]},
        {"query": "a", "pos": ["b"], "instruction": "own: "},
        {"query": "a", "pos": ["b"], "prompt": ""},
        {"query": "a", "pos": ["b"], "instruction": {"passage": "other: "}},
    ]
    report, found = convert(tmp_path, tokenizer, *records, query_instruction="Q: ", passage_instruction="P: ")
    assert found == [["Q: a", "P: b", "P: c"], ["own: a", "P: b"], ["a", "P: b"], ["Q: a", "other: b"]]
    assert (report.documents, report.counts[NO_NEGATIVES]) == (9, 3)
    assert groups_at(tmp_path / "out").query_instruction == "Q: "
    assert GroupTable(tmp_path / "out").counts.tolist() == [[1, 1], [1, 0], [1, 0], [1, 0]]


def test_what_is_left_out_of_a_group_is_counted_with_its_score(tokenizer, tmp_path):
    record = {
        "query": "a",
        "pos": ["b", "b", "c"],
        "neg": ["d", "", "b", "d", "a", "e"],
        "pos_scores": [1, 2, 3],
        "neg_scores": [4, 5, 6, 7, 8, 9.5],
    }
    report, found = convert(tmp_path, tokenizer, record, {"query": "a", "pos": "b", "neg": ["c"]})
    assert found == [["a", "b", "c", "d", "e"], ["a", "b", "c"]]
    assert {name: report.counts[name] for name in (REPEATED, EMPTY, POSITIVE_TOO, SCORED)} == {
        REPEATED: 2,
        EMPTY: 1,
        POSITIVE_TOO: 2,
        SCORED: 1,
    }
    scores = np.load(tmp_path / "out.scores.npy")
    assert scores[1:5].tolist() == [1.0, 3.0, 4.0, 9.5]
    assert np.isnan(scores[[0, 5, 6, 7]]).all()
    in_one = {**record, "scores": [1, 2, 3, 4, 5, 6, 7, 8, 9.5]}
    del in_one["pos_scores"], in_one["neg_scores"]
    assert parse_group(json.dumps(in_one)) == parse_group(json.dumps(record))


def test_texts_are_cut_at_their_limit_and_end_with_the_end_token(tokenizer, tmp_path):
    long = {"query": "abcdefgh", "pos": "hgfedcba", "neg": ["hgfedcxx", "abababab"]}
    report, found = convert(tmp_path, tokenizer, long, end=True, query_length=9, passage_length=6)
    assert found == [
        ["abcdefgh<|im_end|>", "hgfed<|im_end|>", "ababa<|im_end|>"]
    ]  # a negative that is the positive now
    assert [report.counts[name] for name in (QUERIES_CUT, PASSAGES_CUT, POSITIVE_TOO)] == [0, 2, 1]
    own = f"{tmp_path / 'out'}-tokenizer"
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(own)(["abcdefgh", "hgfedcba"], truncation=True, max_length=6)
    assert theirs["input_ids"] == [e.ids.tolist() for e in TextEncoder(own).encode(["abcdefgh", "hgfedcba"], 6)]
    with pytest.raises(DataError, match="ends each text already: text <\\|im_end\\|>: leave out --end"):
        convert(tmp_path, own, long, end=True)
    with pytest.raises(DataError, match="limit of 1 tokens: the tokenizer puts 1 around each text: give 2 or more"):
        convert(tmp_path, own, long, query_length=1)


def test_groups_with_too_few_negatives_are_left_out_and_counted(tokenizer, tmp_path):
    records = [{"query": "a", "pos": "b", "neg": ["c"]}, {"query": "d", "pos": "b", "neg": ["b"]}]
    report, found = convert(tmp_path, tokenizer, *records, min_negatives=1)
    assert (found, report.dropped[TOO_FEW].examples[0][1:]) == ([["a", "b", "c"]], (2, "0"))


KEYS = [2583325001053750962, 8020113856005318197, 2403933214956373869]

REFUSED = {
    "no JSON": ("no", "no JSON"),
    "a list": ([], "is list, not an object with query, pos and neg"),
    "no query": ({"text": "a"}, "has no query (its keys are text)"),
    "an empty query": ({"query": " ", "pos": "b"}, "the query is empty"),
    "no positive": ({"query": "a", "pos": [], "neg": ["b"]}, "has no pos: a group needs a positive"),
    "an empty positive": ({"query": "a", "pos": ["b", " "]}, "positive 2 is empty"),
    "the query": ({"query": "a", "pos": ["b", "a "]}, "the query is equal to positive 2"),
    "no texts": ({"query": "a", "pos": [1]}, "pos is a list with int: give a text or a list of texts"),
    "no list": ({"query": "a", "pos": "b", "neg": {}}, "neg is dict: give a text or a list of texts"),
    "fewer scores": (
        {"query": "a", "pos": "b", "neg": ["c"], "scores": [1]},
        "scores has 1 numbers, pos and neg have 2",
    ),
    "scores of one side": (
        {"query": "a", "pos": "b", "neg": ["c"], "pos_scores": [1]},
        "neg_scores has 0 numbers",
    ),
    "no numbers": ({"query": "a", "pos": "b", "pos_scores": ["1"]}, "pos_scores is no list of finite numbers"),
    "scores twice": ({"query": "a", "pos": "b", "pos_scores": [1], "scores": [1]}, "has scores beside pos_scores"),
    "instruction": ({"query": "a", "pos": "b", "instruction": 3}, "instruction is neither a text nor an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_that_is_no_group_is_refused_by_file_and_line(name, tokenizer, tmp_path):
    record, message = REFUSED[name]
    path = write(tmp_path / "in.jsonl", {"query": "a", "pos": "b"})
    path.write_text(path.read_text() + ("no\n" if record == "no" else json.dumps(record) + "\n"))
    with pytest.raises(DataError) as error:
        preprocess_groups([path], tokenizer, tmp_path / "out", GroupOptions())
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    report, _ = preprocess_groups([path], tokenizer, tmp_path / "out", GroupOptions(), bad_lines="skip")
    assert (report.documents, report.bad_lines) == (2, 1)


@pytest.fixture(scope="module")
def prefix(tokenizer, tmp_path_factory):
    """40 groups of one or two positives and 1 to 5 negatives, in a source."""
    folder = tmp_path_factory.mktemp("groups")
    path = write_groups(folder / "groups.jsonl", 40, negatives=5, scores=True)
    preprocess_groups([path], tokenizer, folder / "groups", GroupOptions(), shard_bytes=900)
    return folder / "groups"


def run_config(tmp_path, tokenizer, *prefixes, **changes):
    data = {"sources": [{"path": str(p)} for p in prefixes], "tokenizer": str(tokenizer), "split": "80,20,0"}
    objective = {"kind": "contrastive", "passages": 4, **changes.pop("more", {})}
    objective = changes.pop("objective", objective)
    return tiny_config(
        tmp_path, data=data, train__seq_length=120, objective=objective, model__vocab_size=300, **changes
    )


def source_of(config, tokenizer, split="train", samples=30):
    return build_split(config, Tokenizer(tokenizer), split, samples, IndexCache(None, may_build=True))


def test_the_choice_of_an_epoch_follows_from_seed_epoch_and_group_alone(prefix):
    table, every = GroupTable(prefix), np.arange(40)
    first = table.choose(every, passages=4, seed=1, epoch=0)
    assert (table.choose(every[::-1], passages=4, seed=1, epoch=0) == first[::-1]).all()
    others = [table.choose(every, passages=4, seed=s, epoch=e) for s, e in ((1, 1), (2, 0))]
    assert all((other != first).any() for other in others)
    for group in every.tolist():
        query, positive, *negatives = first[group].tolist()
        positives, count = table.counts[group].tolist()
        own = range(query + 1 + positives, query + 1 + positives + count)
        assert (query, positive in range(query + 1, own.start)) == (table.queries[group], True)
        assert set(negatives) <= set(own)
        assert len(set(negatives)) == min(3, count)  # none twice while there are others
        assert table.lengths[first[group]].sum() <= table.most_tokens(4)[group]
    seen = {int(n) for epoch in range(40) for n in table.choose(every, passages=4, seed=1, epoch=epoch).flat}
    assert len(seen) == len(table.lengths)
    assert keys_of(np.arange(3), 7, 2).tolist() == KEYS, (
        "an interrupted run of an earlier version would read other texts"
    )


def test_the_most_that_a_group_takes_is_what_its_longest_texts_take(prefix):
    table = GroupTable(prefix)
    for passages in (1, 2, 9):
        most = table.most_tokens(passages)
        for group in range(40):
            query, (positives, count) = int(table.queries[group]), table.counts[group].tolist()
            lengths = table.lengths[query : query + 1 + positives + count].tolist()
            negatives = sorted(lengths[1 + positives :], reverse=True)
            taken = [negatives[n % count] for n in range(passages - 1)]
            assert most[group] == lengths[0] + max(lengths[1 : 1 + positives]) + sum(taken)


def test_rows_are_packs_of_whole_groups_and_an_epoch_has_each_group_of_its_split_once(prefix, tokenizer, tmp_path):
    config, table = run_config(tmp_path, tokenizer, prefix), GroupTable(prefix)
    members = {}
    for split in ("train", "valid"):
        source = source_of(config, tokenizer, split)
        per_epoch = len(source.indices)
        assert len(source.members) % per_epoch == 0
        members[split] = sorted(source.members[:per_epoch].tolist())
        for number in range(len(source)):
            row, documents = source[number], source.documents_of(number)
            assert row["lengths"].tolist() == table.lengths[documents.flat].tolist()
            assert row["lengths"].sum() <= 120
            place = int(row["documents"][1])
            assert (
                row["tokens"][place : place + row["lengths"][1]].tolist()
                == source.dataset.get(documents[0, 1]).tolist()
            )
            np.testing.assert_array_equal(row["extras"]["teacher"], table.scores[documents[:, 1:]].reshape(-1))
        assert [n for n, _, _ in source.pieces(0)] == source.documents_of(0).reshape(-1).tolist()
        assert source.tokens_of(len(source)) == source.taken.sum()
    assert members == {"train": list(range(32)), "valid": list(range(32, 40))}
    where = Provenance(source_of(config, tokenizer), ["groups"]).parts(0)
    assert {(part.file, part.line) for part in where} == {
        (str(prefix.with_suffix(".jsonl")), group + 1) for group in source_of(config, tokenizer).members_of(0)
    }


def test_equal_texts_have_equal_hashes_and_a_batch_keeps_the_order():
    rows = [
        pack_texts([np.array(ids) for ids in texts], 8, pad=9) for texts in ([[1, 2], [3]], [[3], [1, 2], [1, 2, 3]])
    ]
    assert rows[0]["tokens"].tolist() == [1, 2, 3, 9, 9, 9, 9, 9]
    assert rows[0]["documents"].tolist() == [0, 2, 8]
    batch = Batch.of(collate(rows), torch.device("cpu"))
    assert batch.lengths.tolist() == [2, 1, 1, 2, 3]
    assert batch.documents.tolist() == [0, 2, 8, 9, 11, 16]
    a, b, c, d, e = batch.extras["texts"].tolist()
    assert (a, b) == (d, c)
    assert len({a, b, e}) == 3


def test_a_batch_is_of_one_source_and_sources_take_turns_by_weight(prefix, tokenizer, tmp_path):
    write_groups(tmp_path / "more.jsonl", 30, negatives=5, seed=3)
    preprocess_groups([tmp_path / "more.jsonl"], tokenizer, tmp_path / "more", GroupOptions())
    sources = [{"path": str(prefix), "weight": 3}, {"path": str(tmp_path / "more")}]
    config = run_config(tmp_path, tokenizer, data__sources=sources)
    blend = source_of(config, tokenizer, samples=80)
    sources = [blend[n]["dataset_id"] for n in range(80)]
    batches = [set(sources[first : first + 8]) for first in range(0, 80, 8)]
    assert all(len(batch) == 1 for batch in batches)
    assert [next(iter(batch)) for batch in batches].count(1) in (2, 3)
    for source in (0, 1):
        own = [blend.place(n)[1] for n in range(80) if blend.place(n)[0] == source]
        assert own == list(range(len(own)))
    mixed = run_config(tmp_path, tokenizer, prefix, tmp_path / "more", more={"same_source": False})
    found = [source_of(mixed, tokenizer, samples=80)[n]["dataset_id"] for n in range(8)]
    assert set(found) == {0, 1}


def test_a_new_batch_size_is_another_order_where_batches_are_of_one_source(prefix, tokenizer, tmp_path):
    two = {"data__sources": [{"path": str(prefix)}, {"path": "another"}]}
    saved = run_config(tmp_path, tokenizer, **two).model_dump(mode="json")
    changed = {"consumed": 24, "rate_steps": 3}
    notes = describe_changes(saved, run_config(tmp_path, tokenizer, train__global_batch_size=16, **two), **changed)
    assert any(note.startswith("the order of the samples is another one from here on") for note in notes)
    assert any(
        note.startswith("24 samples are no multiple of train.global_batch_size (16): from here on") for note in notes
    )
    mixed = {**two, "more": {"same_source": False}, "train__global_batch_size": 16}
    saved = {**saved, "objective": {**saved["objective"], "same_source": False}}
    notes = describe_changes(saved, run_config(tmp_path, tokenizer, **mixed), **changed)
    assert notes[-1] == "the samples go on in their order, in steps of the new batch size"


def test_what_a_run_cannot_read_is_refused_and_repeated_negatives_are_said(prefix, tokenizer, tmp_path):
    assert check_sources(run_config(tmp_path, tokenizer, prefix)).vocab_size == 300
    few = int((GroupTable(prefix).counts[:, 1] < 3).sum())
    assert notes_on_groups([str(prefix)], 4) == [
        f"data source {prefix}: {few} of 40 groups have fewer than 3 negatives; theirs are taken more than once in an epoch"
    ]
    found = required(groups_at(prefix), "groups")
    options: dict[str, Any] = {"passages": 4, "tokenizer": tokenizer, "vocab_size": 300}
    with pytest.raises(
        DataError, match=r"a group can take \d+ places \(.*groups.jsonl:\d+\), .* train.seq_length \(50\)"
    ):
        check_groups(str(prefix), found, places=50, **options)
    with pytest.raises(DataError, match="tokenizer has 300 ids, model.vocab_size is 299"):
        check_groups(str(prefix), found, places=120, passages=4, tokenizer=tokenizer, vocab_size=299)
    with pytest.raises(DataError, match="objective.kind next_token reads text"):
        check_sources(run_config(tmp_path, tokenizer, prefix, objective={"kind": "next_token"}))
    write_pairs(tmp_path / "pairs.jsonl", 4)
    preprocess_chat([tmp_path / "pairs.jsonl"], tokenizer, tmp_path / "pairs", ChatOptions(CHATML, pairs=True))
    with pytest.raises(
        DataError, match="holds pairs, objective.kind contrastive reads groups of a query and its passages"
    ):
        check_sources(run_config(tmp_path, tokenizer, tmp_path / "pairs"))
    report, _ = convert(
        tmp_path, tokenizer, {"query": "a", "pos": "b", "neg": ["c"]}, {"query": "d", "pos": "b"}, end=True
    )
    assert report.counts[NO_NEGATIVES] == 1
    with pytest.raises(DataError, match="puts other tokens around a text than data.tokenizer"):
        check_sources(run_config(tmp_path, tokenizer, tmp_path / "out"))
    with pytest.raises(DataError, match=r"1 of 2 groups have no negative \(.*in.jsonl:2\), objective.passages is 4"):
        check_sources(run_config(tmp_path, f"{tmp_path / 'out'}-tokenizer", tmp_path / "out"))
    scores = {"kind": "contrastive", "passages": 2, "distill": 1.0}
    unscored = write_groups(tmp_path / "unscored.jsonl", 12)
    preprocess_groups([unscored], tokenizer, tmp_path / "unscored", GroupOptions())
    with pytest.raises(
        DataError, match="objective.distill is 1.0, and no group of data.sources has a teacher's scores"
    ):
        check_sources(run_config(tmp_path, tokenizer, tmp_path / "unscored", objective=scores))
    assert check_sources(run_config(tmp_path, tokenizer, prefix, objective=scores)).vocab_size == 300
    with pytest.raises(DataError, match="holds groups of `data groups`: choose another prefix"):
        preprocess([tmp_path / "in.jsonl"], tokenizer, tmp_path / "out", overwrite=True)
    np.save(tmp_path / "out.groups.npy", np.ones((1, 2), dtype=np.int32))
    with pytest.raises(DataError, match=r"out.groups.npy is of 3 texts, the .idx of 5: run `data groups` again"):
        GroupTable(tmp_path / "out")
    (tmp_path / "out.scores.npy").unlink()
    with pytest.raises(DataError, match=r"holds groups, but .*out.scores.npy is missing"):
        groups_at(tmp_path / "out")


def test_the_commands_say_what_they_wrote_and_show_whole_groups(tokenizer, tmp_path):
    path = write_groups(tmp_path / "in.jsonl", 20, scores=True)
    words = ["data", "groups", str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), "--end"]
    done = invoke([*words, "--passage-length", "9", "--query-instruction", "Find: "])
    assert done.exit_code == 0, done.error
    texts = len(read_lengths(str(tmp_path / "out")))
    assert f"20 groups of {texts} texts, " in done.printed
    assert "; 10 with scores; 0 queries and " in done.printed
    assert f"each text is: text <|im_end|>; a run names the tokenizer {tmp_path / 'out'}-tokenizer" in done.printed
    shown = invoke(["data", "inspect", str(tmp_path / "out"), "--samples", "2"])
    assert "20 groups, 10 with a teacher's scores" in shown.printed
    assert "before each query, unless its line says otherwise: 'Find: '" in shown.printed
    assert f"group 19, {path}:20:\n  query (" in shown.printed
    assert '"Find: where is ' in shown.printed
    assert "\n  neg 0." in shown.printed
    assert "exists: choose another prefix" in invoke(words).error
