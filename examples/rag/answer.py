"""Answers questions over a folder of text: an embedding model finds passages, a language model answers with them.

    python examples/rag/answer.py docs "How does a killed run resume?" --embedder runs/embed --model runs/chat

A passage is a paragraph of a .txt or .md file. The embedding model is a run, a checkpoint, a Hugging Face folder or a
sentence-transformers folder; the language model a run, a checkpoint or a Hugging Face folder. Nothing is fetched. Without
--model, the script prints the passages alone. faiss searches (pip install flagscale_like[rag]); without it numpy does, as
exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flagscale_like.cli.base import open_model
from flagscale_like.config import Parallel
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import UserError, required
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.model.spec import ModelSpec
from flagscale_like.recipes.embedder import Embedder, Side, Text, settings_of, with_options
from flagscale_like.runtime.parallel import ParallelContext, parallel_context

PROMPT = "{passages}\n\nQuestion: {question}\nAnswer:"
BLOCK = 256  # passages that are encoded at a time

Encode = Callable[[Sequence[str], Side], np.ndarray]


@dataclass(frozen=True)
class Passage:
    """A paragraph, and the file that it is from."""

    file: Path
    text: str


def read_passages(folder: Path) -> list[Passage]:
    """The paragraphs of the .txt and .md files of a folder, and of the folders in it.

    Raises:
        UserError: there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md"))
    found = [
        Passage(path, " ".join(part.split()))
        for path in files
        for part in path.read_text(encoding="utf-8").split("\n\n")
        if part.strip()
    ]
    if not found:
        raise UserError(f"{folder}: holds no text in .txt or .md files")
    return found


class Index:
    """Exact search over vectors of length 1, [n, h]."""

    def __init__(self, vectors: np.ndarray) -> None:
        try:
            import faiss
        except ImportError:
            print("faiss is not installed (pip install flagscale_like[rag]): numpy searches, exactly", file=sys.stderr)
            self._vectors, self._faiss = vectors, None
            return
        self._faiss = faiss.IndexFlatIP(vectors.shape[1])
        self._faiss.add(vectors)

    def search(self, query: np.ndarray, count: int) -> list[tuple[int, float]]:
        """Number and cosine of the `count` nearest vectors of one query, [h], the nearest first."""
        if self._faiss is not None:
            scores, numbers = self._faiss.search(query[None], count)
            return [(int(n), float(s)) for n, s in zip(numbers[0], scores[0], strict=True) if n >= 0]
        scores = self._vectors @ query
        order = np.argsort(-scores, kind="stable")[:count]
        return [(int(n), float(scores[n])) for n in order]


def open_encoder(args: argparse.Namespace, ctx: ParallelContext) -> Encode:
    """What turns texts of a side into vectors of length 1: our embedding model, or sentence-transformers' (--library)."""
    given: dict[Side, str | None] = {"query": args.query_instruction, "passage": args.passage_instruction}
    if args.library:
        from sentence_transformers import SentenceTransformer

        model, names = SentenceTransformer(str(args.embedder)), {"query": "query", "passage": "document"}

        def encode(texts: Sequence[str], side: Side) -> np.ndarray:
            own = {"prompt": given[side]} if given[side] is not None else {"prompt_name": names[side]}
            return model.encode(list(texts), normalize_embeddings=True, **own)

        return encode
    source, tokenizer = open_model(args.embedder, adapter=None)
    if tokenizer is None:
        raise UserError(f"{args.embedder}: names no tokenizer")
    settings = with_options(settings_of(source), pooling=args.pooling, instructions=given)
    embedder = Embedder(source, tokenizer, ctx, settings)

    def encode_by_ours(texts: Sequence[str], side: Side) -> np.ndarray:
        return required(embedder.encode([Text(text) for text in texts], side), "vectors on rank 0")

    return encode_by_ours


class Answerer:
    """A language model that answers with passages before the question."""

    def __init__(self, folder: Path, ctx: ParallelContext, max_new_tokens: int) -> None:
        source, tokenizer = open_model(folder, adapter=None)
        if tokenizer is None:
            raise UserError(f"{folder}: names no tokenizer")
        self.words, self.count, self.limit = Tokenizer(tokenizer), max_new_tokens, source.arch.longest_sequence
        spec = ModelSpec(arch=source.arch, lora=getattr(source, "lora", None))
        self.engine = OwnEngine(Engine.build(spec, ctx, source=source), rows=1)

    def answer(self, question: str, passages: Sequence[Passage]) -> str:
        """The answer. Of the passages, the first ones that fit the model."""
        for kept in range(len(passages), -1, -1):
            text = PROMPT.format(passages="\n\n".join(p.text for p in passages[:kept]), question=question)
            ids = self.words.encode_batch([text])[0]
            if not self.limit or len(ids) + self.count <= self.limit:
                break
        if kept < len(passages):
            print(f"{len(passages) - kept} passages do not fit the model's {self.limit} tokens", file=sys.stderr)
        sampling = Sampling(self.count, temperature=0, stop=(self.words.eod,))
        (rollout,) = self.engine.generate([Prompt(ids, 0)], sampling)
        return self.words.continuation(ids, rollout.ids).strip()


def main(arguments: Sequence[str] | None = None) -> list[tuple[list[Passage], str]]:
    """Print passages and an answer for each question.

    Args:
        arguments: command line; None takes sys.argv.

    Returns:
        Of each question, its passages and the answer; "" without a language model.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of .txt and .md files")
    parser.add_argument("questions", nargs="+", help="questions")
    parser.add_argument("--embedder", type=Path, required=True, help="embedding model")
    parser.add_argument("--library", action="store_true", help="let sentence-transformers run the embedding model")
    parser.add_argument("--model", type=Path, help="language model")
    parser.add_argument("--top", type=int, default=3, help="passages of a question")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--pooling", choices=("last", "mean", "first"), help="where the embedding model does not say")
    parser.add_argument("--query-instruction", help="put before each question")
    parser.add_argument("--passage-instruction", help="put before each passage")
    args = parser.parse_args(arguments)
    passages, results = read_passages(args.folder), []
    with parallel_context(Parallel(), alone=True) as ctx:
        encode = open_encoder(args, ctx)
        texts = [passage.text for passage in passages]
        blocks = [encode(texts[start : start + BLOCK], "passage") for start in range(0, len(texts), BLOCK)]
        index = Index(np.concatenate(blocks).astype(np.float32))
        answerer = Answerer(args.model, ctx, args.max_new_tokens) if args.model else None
        for question in args.questions:
            nearest = index.search(encode([question], "query")[0].astype(np.float32), args.top)
            print(f"\n{question}")
            for number, score in nearest:
                print(f"  {score:.3f} {passages[number].file}: {passages[number].text[:100]}")
            found = [passages[number] for number, _ in nearest]
            answer = answerer.answer(question, found) if answerer else ""
            if answerer:
                print(f"answer: {answer}")
            results.append((found, answer))
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
