"""Vectors of texts: those of transformers on any layout, a file that a kill interrupts, and the measures of a ranking."""

import numpy as np
import pytest
import pytrec_eval
import torch
from transformers import AutoModel, AutoTokenizer

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.errors import DataError
from flagscale_like.recipes import embed as embed_module
from flagscale_like.recipes.embed import VectorFile, embed_file, read_texts
from flagscale_like.recipes.embedder import Embedder, EmbedderSettings, Text
from flagscale_like.recipes.retrieval import CUTS, Search, measures, read_collection
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import run_commands
from tests.data.retrieval import tiny_llama, write_records
from tests.harness import run_ranks

TEXTS = [" ".join("abcdefgh"[(n * k) % 8] * (1 + n % 5) for k in range(1, 3 + n % 7)) for n in range(70)]
WHOLE = ["find: " + text for text in TEXTS]
POOLINGS = ("last", "mean", "first")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("embed") / "llama")


def vectors_on(folder, pooling, layout, micro_batch_size=1):
    with parallel_context(Parallel(**layout)) as ctx:
        settings = EmbedderSettings(pooling, {"query": "find: "}, {"query": 12, "passage": 12})
        embedder = Embedder(HfFolder(folder), folder, ctx, settings, max_tokens=64, micro_batch_size=micro_batch_size)
        found = embedder.encode([Text(text) for text in TEXTS], "query")
        return found, embedder.cut


def vectors_by_pooling(folder):
    return {pooling: vectors_on(folder, pooling, {}) for pooling in POOLINGS}


def vectors_of_transformers(folder, pooling):
    words, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for text in WHOLE:
        ids = words(text, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        rows.append({"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[pooling])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def test_vectors_are_those_of_transformers_on_every_layout(llama):
    (every,) = run_ranks(1, vectors_by_pooling, llama)
    for pooling in POOLINGS:
        expected, (found, cut) = vectors_of_transformers(llama, pooling), every[pooling]
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert cut == sum(len(ids) > 12 for ids in AutoTokenizer.from_pretrained(llama)(WHOLE)["input_ids"])
        if pooling == "mean":
            for name, layout, size in (("dp", {}, 2), ("pp", {"pp": 2}, 1), ("tp and sp", {"tp": 2, "sp": True}, 1)):
                (other, _), (nothing, _) = run_ranks(2, vectors_on, llama, pooling, layout, size)
                np.testing.assert_allclose(other, expected, atol=2e-6, err_msg=name)
                assert nothing is None


def encode_file(folder, path, out, fail_at=None, **options):
    """embed_file() in blocks of 16 texts; `fail_at` ends it in that block, as a kill would."""
    embed_module.BLOCK = 16
    with parallel_context(Parallel()) as ctx:
        embedder = Embedder(HfFolder(folder), folder, ctx, EmbedderSettings("last"))
        encode, blocks = embedder.encode, []

        def counted(texts, side):
            blocks.append(len(texts))
            if len(blocks) == fail_at:
                raise KeyboardInterrupt
            return encode(texts, side)

        embedder.encode = counted
        try:
            embed_file(embedder, path, out, made_from={"weights": "a"}, **options)
        except KeyboardInterrupt:
            return blocks
        return blocks


def interrupted_files(folder, path, work):
    """The blocks that each call encoded: one at once, one that is interrupted twice."""
    found = [encode_file(folder, path, work / "whole.npy")]
    for fail_at in (3, 2, None):
        found.append(encode_file(folder, path, work / "parts.npy", fail_at))
    encode_file(folder, path, work / "half.npy", dtype="float16", dimensions=8)
    encode_file(folder, path, work / "begun.npy", 2)
    return found


def test_an_interrupted_file_goes_on_where_it_ended_and_has_the_same_bytes(llama, tmp_path):
    path = write_records(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    ((blocks),) = run_ranks(1, interrupted_files, llama, path, tmp_path)
    assert blocks == [[16] * 4 + [6], [16] * 3, [16] * 2, [16, 6]]
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.npy"]
    whole, half = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "half.npy")
    assert (whole.shape, whole.dtype, half.shape, half.dtype) == ((70, 32), np.float32, (70, 8), np.float16)
    shorter = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(half, shorter, atol=1e-3)
    with pytest.raises(DataError, match="whole.npy: exists: choose another file, or replace it with --overwrite"):
        VectorFile(tmp_path / "whole.npy", (70, 32), np.dtype("float32"), {}, overwrite=False)
    with pytest.raises(DataError, match="was begun by a call that differs in weights: repeat that command, or remove"):
        VectorFile(tmp_path / "begun.npy", (70, 32), np.dtype("float32"), {"weights": "b"}, overwrite=False)


def test_an_empty_text_is_refused_by_file_and_line(tmp_path):
    path = write_records(tmp_path / "in.jsonl", [{"a": "b"}, {"a": " "}])
    with pytest.raises(DataError, match=r"in.jsonl:2: the text is empty: each line has a vector"):
        list(read_texts(path, "a"))
    with pytest.raises(DataError, match=r"in.jsonl:1: no JSON object with a 'text' field"):
        list(read_texts(path, "text"))
    (tmp_path / "in.txt").write_text("a\n\nb\n")
    with pytest.raises(DataError, match=r"in.txt:2: the text is empty"):
        list(read_texts(tmp_path / "in.txt", "text"))


def test_the_measures_are_those_of_trec_eval():
    draw = np.random.RandomState(0)
    relevant = [
        {int(p): int(draw.randint(1, 4)) for p in draw.choice(300, draw.randint(1, 30), replace=False)}
        for _ in range(50)
    ]
    ranking = np.stack([draw.permutation(300)[:100] for _ in range(50)])
    names = [*(f"recall.{cut}" for cut in CUTS), "recip_rank", "ndcg_cut.10"]
    judged = {f"q{n}": {f"p{p}": grade for p, grade in grades.items()} for n, grades in enumerate(relevant)}

    def of_trec_eval(depth):
        run = {
            f"q{n}": {f"p{p}": -float(place) for place, p in enumerate(row[:depth])} for n, row in enumerate(ranking)
        }
        found = pytrec_eval.RelevanceEvaluator(judged, set(names)).evaluate(run).values()
        return {name.replace(".", "_"): np.mean([one[name.replace(".", "_")] for one in found]) for name in names}

    found, whole = measures(ranking, relevant), of_trec_eval(100)
    expected = {f"recall@{cut}": whole[f"recall_{cut}"] for cut in CUTS}
    expected |= {"MRR@10": of_trec_eval(10)["recip_rank"], "NDCG@10": whole["ndcg_cut_10"]}
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.02 < found["NDCG@10"] < 0.3


def test_the_search_over_blocks_is_exact_and_orders_equal_scores_by_number():
    draw = np.random.RandomState(1)
    queries, passages = (draw.randn(n, 8).astype(np.float32) for n in (9, 500))
    passages[[40, 300]] = passages[7]
    found = Search(queries, 20, torch.device("cpu"))
    for start in range(0, 500, 37):
        found.add(passages[start : start + 37])
    ids, scores = found.ranking()
    every = queries @ passages.T
    order = np.lexsort((np.broadcast_to(np.arange(500), every.shape), -every), axis=1)[:, :20]
    assert (ids == order).all()
    np.testing.assert_allclose(scores, np.take_along_axis(every, order, axis=1), atol=1e-6)
    few = Search(queries, 20, torch.device("cpu"))
    few.add(passages[:3])
    assert few.ranking()[0].shape == (9, 3)


def write_collection(folder, texts):
    write_records(folder / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(texts[:20])])
    write_records(folder / "corpus.jsonl", [{"_id": n, "title": text, "text": ""} for n, text in enumerate(texts)])
    (folder / "qrels").mkdir()
    lines = [f"q{n}\t{n}\t1" for n in range(20)] + ["q0\t99999\t1", "q1\t2\t0"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def test_a_collection_is_read_and_what_is_left_out_is_said(tmp_path):
    folder = write_collection(tmp_path / "beir", [*TEXTS, TEXTS[0], " "])
    found = read_collection(folder)
    assert (len(found.queries), len(found.passages)) == (20, 71)
    assert found.relevant["q1"] == {"1": 1}
    assert [note.partition(": ")[2] for note in found.notes] == [
        "1 empty texts are left out",
        "1 judgements of a query or a passage that is not there are left out",
        f"{71 - len(set(TEXTS))} passages repeat the text of another",
    ]
    with pytest.raises(DataError, match="has neither qrels/dev.tsv nor qrels.jsonl"):
        read_collection(folder, "dev")
    (folder / "qrels" / "bad.tsv").write_text("a\tb\tc\nq0\t1\n")
    with pytest.raises(DataError, match=r"bad.tsv:2: needs a query's id, a passage's id and a grade"):
        read_collection(folder, "bad")
    write_records(folder / "queries.jsonl", [{"_id": "q0", "text": "a"}, {"_id": "q0", "text": "b"}])
    with pytest.raises(DataError, match=r"queries.jsonl:2: the id 'q0' is there twice"):
        read_collection(folder)


def test_the_commands_encode_and_measure_on_several_ranks(llama, tmp_path):
    """A query that is a passage's text finds that passage; the ranks of the command share the work."""
    folder = write_collection(tmp_path / "beir", sorted(set(TEXTS)))
    texts = write_records(tmp_path / "texts.jsonl", [{"words": text} for text in TEXTS])
    ask = ["evaluate", "--hf", str(llama), "--retrieval", str(folder), "--pooling", "mean", "--nproc-per-node", "2"]
    embed = ["embed", str(texts), "--hf", str(llama), "--key", "words", "--out", str(tmp_path / "out.npy")]
    outcomes, _ = run_commands([ask, embed, [*embed, "--pooling", "mean"], [*embed, "--pooling", "mean"]], ranks=2)
    assert outcomes[0].exit_code == 0, outcomes[0].error
    assert "recall@1 1.0000" in outcomes[0].printed
    assert f"over 20 queries and {len(set(TEXTS))} passages" in outcomes[0].printed
    assert "does not say how it pools: give --pooling last, mean or first" in outcomes[1].error
    assert f"wrote {tmp_path / 'out.npy'}: 70 vectors of 32 numbers, float32" in outcomes[2].printed
    assert "out.npy: exists" in outcomes[3].error
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "out.npy"), axis=1), 1, atol=1e-6)
