"""Hard negatives and teacher scores: which passages are found, what is left out, and the scores of a language model."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.recipes import teacher as teacher_module
from flagscale_like.recipes.embedder import Embedder, EmbedderSettings, Text
from flagscale_like.recipes.mine import MineOptions, mine
from flagscale_like.recipes.teacher import Teacher, check_template, score_file
from flagscale_like.runtime.parallel import parallel_context
from tests.commands import run_commands
from tests.data.retrieval import tiny_llama, write_records
from tests.harness import run_ranks

WORDS: list[str] = [f"{a}{b} {c}" for a in "abcd" for b in "efgh" for c in ("is here", "is there")]
RECORDS: list[dict[str, Any]] = [
    {"query": f"where is {w[:2]}?", "pos": [w], "neg": [WORDS[n - 1]], "id": n, "scores": [1, 2]}
    for n, w in enumerate(WORDS[::2])
]
PASSAGES = [*WORDS, RECORDS[0]["query"]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("mine") / "llama")


def mined_on(folder, path, corpus, layout, options):
    with parallel_context(Parallel(**layout)) as ctx:
        embedder = Embedder(HfFolder(folder), folder, ctx, EmbedderSettings("mean"))
        vectors = [embedder.encode([Text(text) for text in texts], "query") for texts in (PASSAGES, queries())]
        return mine(embedder, path, corpus, options), vectors


def queries():
    return [record["query"] for record in RECORDS]


def test_negatives_are_ranked_passages_that_are_no_positives(llama, tmp_path):
    path = write_records(tmp_path / "in.jsonl", RECORDS)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join([*PASSAGES, WORDS[3], *WORDS[:2]]) + "\n")
    options = MineOptions(first=2, last=9, count=4, seed=3)
    ((found, (passages, asked)),) = run_ranks(1, mined_on, llama, path, corpus, {}, options)
    assert (found.passages, found.repeated, found.empty, found.replaced, found.unscored) == (33, 3, 0, 16, 16)
    assert (found.short, found.without) == (0, 0)
    order = np.argsort(-(asked @ passages.T), axis=1, kind="stable")
    for n, (record, before) in enumerate(zip(found.records, RECORDS, strict=True)):
        candidates = [PASSAGES[p] for p in order[n] if PASSAGES[p] not in (before["pos"][0], before["query"])][2:9]
        assert [text for text in candidates if text in record["neg"]] == record["neg"]
        assert len(set(record["neg"])) == 4
        assert before["query"] not in record["neg"]
        assert {k: record[k] for k in ("query", "pos", "id")} == {k: before[k] for k in ("query", "pos", "id")}
        assert "scores" not in record
    (others, _), (nothing, _) = run_ranks(2, mined_on, llama, path, corpus, {"pp": 2}, options)
    assert nothing is None
    assert others.records == found.records


def test_the_commands_say_what_they_left_out_and_score_with_the_reward_of_llm_embedder(llama, tmp_path):
    path = write_records(tmp_path / "in.jsonl", [{**record, "answers": ["it is", "no"]} for record in RECORDS])
    out, scored = tmp_path / "mined.jsonl", tmp_path / "scored.jsonl"
    words = ["data", "mine", str(path), "--hf", str(llama), "--pooling", "mean", "--out", str(out)]
    template = ["--template", r"{passage}\n{query} {answer}", "--answer", "answers"]
    score = ["data", "score", str(path), "--hf", str(llama), "--out", str(scored), "--seq-length", "40", *template]
    lines = [
        [*words, "--range", "0-3", "--count", "5", "--below-positive", "0.5"],
        words,
        [*words, "--overwrite", "--range", "7-3"],
        score,
    ]
    mined, again, wrong, done = run_commands(lines, ranks=2)[0]
    assert mined.exit_code == 0, mined.error
    assert "16 queries with negatives of ranks 0 to 3 of 24 passages" in mined.printed
    assert (
        "left out: 8 passages of the corpus that repeat another, 16 negatives of the records, 16 records'"
        in mined.printed
    )
    assert "queries have fewer than 5 negatives" in mined.printed
    assert "mined.jsonl: exists: choose another file" in again.error
    assert "--range '7-3': give two ranks, such as 10-210" in wrong.error
    assert done.exit_code == 0, done.error
    assert "16 records; this call scored 32 passages, 0 of them cut" in done.printed
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama).eval()
    for line in scored.read_text().splitlines():
        record = json.loads(line)
        assert "scores" not in record
        for text, value in zip(record["pos"] + record["neg"], record["pos_scores"] + record["neg_scores"], strict=True):
            before = tokenizer(f"{text}\n{record['query']} ")["input_ids"]
            whole = tokenizer(f"{text}\n{record['query']} it is", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                found = model(whole).logits[0].log_softmax(-1)
            own = whole[0, len(before) :]
            expected = found[len(before) - 1 : -1].gather(1, own[:, None]).mean()
            assert value == pytest.approx(float(expected), abs=1e-4)


def scored_in_parts(folder, path, work):
    teacher_module.BLOCK = 3
    with parallel_context(Parallel()) as ctx:
        teacher = Teacher(HfFolder(folder), folder, ctx, seq_length=48)
        score_file(teacher, path, work / "whole.jsonl", made_from={}, answer="answer", overwrite=False)
        scores, calls = teacher.scores, []

        def ended(examples):
            calls.append(len(examples))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return scores(examples)

        teacher.scores = ended
        try:
            score_file(teacher, path, work / "parts.jsonl", made_from={}, answer="answer", overwrite=False)
        except KeyboardInterrupt:
            with open(work / "parts.jsonl.partial", "ab") as file:
                file.write(b'{"query": "half a line')
        teacher.scores = scores
        return score_file(
            teacher, path, work / "parts.jsonl", made_from={}, answer="answer", overwrite=False
        ), teacher.cut


def test_an_interrupted_scoring_goes_on_and_a_long_passage_is_cut(llama, tmp_path):
    records = [{**record, "answer": "it is", "scores": None} for record in RECORDS[:11]]
    records[5]["pos"] = ["abcdefgh" * 9]
    path = write_records(tmp_path / "in.jsonl", records)
    (((found, _), cut),) = run_ranks(1, scored_in_parts, llama, path, tmp_path)
    assert (found, cut) == (11, 2)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.p*r*"))


def refusals(folder, work):
    messages = []
    with parallel_context(Parallel()) as ctx:
        for name in ("no answer", "no room"):
            teacher = Teacher(HfFolder(folder), folder, ctx, seq_length=12 if name == "no room" else 64)
            try:
                score_file(
                    teacher,
                    work / f"{name}.jsonl",
                    work / f"{name}-out",
                    made_from={},
                    answer="answer",
                    overwrite=False,
                )
            except DataError as error:
                messages.append(str(error))
    return messages


def test_records_without_an_answer_or_room_are_refused_by_file_and_line(llama, tmp_path):
    good = {"query": "a", "pos": "b", "answer": "c"}
    write_records(tmp_path / "no answer.jsonl", [good, {"query": "a", "pos": "b", "answer": []}])
    write_records(tmp_path / "no room.jsonl", [good, {"query": "a" * 30, "pos": "b", "answer": "c"}])
    ((first, second),) = run_ranks(1, refusals, llama, tmp_path)
    assert "no answer.jsonl:2: has no answer in 'answer': name the field with --answer" in first
    assert "no room.jsonl:2: query and answer take " in second
    for template in ("{passage} {query}", "{answer} {query} {passage}", "{passage} {query} {x} {answer}", "{"):
        with pytest.raises(ConfigError, match="--template"):
            check_template(template)
