"""The small example of embedding models: it finds the passages of new queries; the example over it answers with them."""

import contextlib
import io
import runpy
import shutil
import sys

import pytest

from tests.commands import run_commands
from tests.data.retrieval import tiny_llama
from tests.harness import REPOSITORY, run_ranks

KNOWLEDGE = ("Represent this query for retrieving relevant documents: ", "Represent this document for retrieval: ")


def warm(*words: str) -> str:
    """What examples/embed/run.py starts as a process, on ranks that have torch and megatron-core loaded."""
    command, ranks = list(words), 1
    if "--nproc-per-node" in command:
        at = command.index("--nproc-per-node")
        ranks = int(command[at + 1])
        del command[at : at + 2]
    (found,), *_ = run_commands([command], ranks=ranks)
    assert found.exit_code == 0, found.error
    return found.printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of the example, shorter and on two tasks and two ranks, and recall@1 before and after."""
    run_dir = tmp_path_factory.mktemp("embed") / "run"
    with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(io.StringIO()):
        main = runpy.run_path("examples/embed/run.py")["main"]
        words = ["--run-dir", str(run_dir), "--steps", "200", "--ranks", "2", "--tasks", "knowledge", "tool"]
        return run_dir, main(words, run=warm)


def test_it_finds_the_passages_of_queries_that_were_held_out(trained):
    _, found = trained
    assert set(found) == {"knowledge", "tool"}
    for before, after in found.values():
        assert before < 0.2
        assert after > 0.9


def answer(arguments, hide_faiss=False):
    if hide_faiss:
        sys.modules["faiss"] = None
    main = runpy.run_path(str(REPOSITORY / "examples/rag/answer.py"))["main"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        found = main(arguments)
    return [([(p.file.name, p.text) for p in passages], text) for passages, text in found], printed.getvalue()


def test_questions_over_a_folder_get_their_passage_with_and_without_faiss(trained, tmp_path):
    run_dir, _ = trained
    shutil.copytree(run_dir / "data" / "knowledge", tmp_path / "text")
    passages = [
        "here one finds a large automobile.",
        "here one finds a silent\nforest.",
        "here one finds a quick vessel.",
    ]
    (tmp_path / "text" / "places.md").write_text("\n\n".join(passages))
    llm = tiny_llama(tmp_path / "llm")
    words = [
        str(tmp_path / "text"),
        "where is a big car?",
        "where is a fast ship?",
        "--embedder",
        str(run_dir),
        "--top",
        "1",
    ]
    words += ["--query-instruction", KNOWLEDGE[0], "--passage-instruction", KNOWLEDGE[1]]
    ((found, printed),) = run_ranks(1, answer, [*words, "--model", str(llm), "--max-new-tokens", "4"])
    assert [passages for passages, _ in found] == [[("places.md", passages[0])], [("places.md", passages[2])]]
    assert printed.count("answer: ") == 2
    assert "faiss" not in printed
    ((again, printed),) = run_ranks(1, answer, words, True)
    assert [passages for passages, _ in again] == [passages for passages, _ in found]
    assert "faiss is not installed (pip install flagscale_like[rag]): numpy searches, exactly" in printed
    assert "answer: " not in printed
