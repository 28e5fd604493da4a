"""Teacher scores: how much each passage of a group helps a language model with the answer (LLM-Embedder, Zhang et al. 2023).

The score of a passage is the mean log-probability, in nats a token, of the answer's tokens after the passage and the query:
the negative of their loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import numpy as np

from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.chat import weights_of
from flagscale_like.data.pairs import pack_answers
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError, DataError, required
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.preference import AnswerLogProbabilities
from flagscale_like.recipes.mine import SCORE_KEYS, read_records
from flagscale_like.recipes.progress import Progress
from flagscale_like.runtime.parallel import ParallelContext, agree
from flagscale_like.training.row_plan import RowPlan

TEMPLATE = "{passage}\n\n{query}\n\n{answer}"
FIELDS = {"passage", "query", "answer"}
BLOCK = 32  # records that are scored, and written, at a time


@dataclass(frozen=True)
class Example:
    """A passage, a query and its answer as tokens.

    Attributes:
        ids: int32 [n].
        weights: float32 [n], 1 at the tokens of the answer.
        cut: tokens of the passage that were left out.
    """

    ids: np.ndarray
    weights: np.ndarray
    cut: int


class Teacher:
    """A language model that scores passages. All ranks of a layout make one and call it alike; rank 0 gets the scores.

    Args:
        source: the weights.
        template: has {passage}, {query} and {answer}, in any order in which the answer comes last.
        seq_length: places of a row; a passage that does not fit is cut at its end.

    Raises:
        ConfigError: the template lacks a field or ends with another one than the answer.
        DataError: the tokenizer has more ids than the model, or knows no offsets.
    """

    def __init__(
        self,
        source: WeightSource,
        tokenizer: Path,
        ctx: ParallelContext,
        *,
        template: str = TEMPLATE,
        seq_length: int,
        micro_batch_size: int = 1,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        self.ctx, self.template, self.words = ctx, template, Tokenizer(tokenizer)
        check_template(template)
        if self.words.vocab_size > source.arch.vocab_size:
            raise DataError(
                f"tokenizer {tokenizer} has {self.words.vocab_size} ids, the model's vocabulary has "
                f"{source.arch.vocab_size}: use its tokenizer"
            )
        self.spec = ModelSpec(
            arch=source.arch,
            parallel=ctx.layout,
            precision=precision,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            lora=getattr(source, "lora", None),
        )
        self.engine = Engine.build(self.spec, ctx, source=source)
        self.cut = 0

    def example(self, passage: str, query: str, answer: str) -> Example:
        """The tokens of one passage with its query and answer.

        Raises:
            ValueError: query and answer alone do not fit a row, or no token of the answer is left to predict.
        """
        ids, weights = self._encode(passage, query, answer)
        over, cut = len(ids) - self.spec.seq_length, 0
        while over > 0:
            tokens = self.words.encode_batch([passage])[0]
            if not tokens:
                raise ValueError(f"query and answer take {len(ids):,} places of a row of {self.spec.seq_length:,}")
            kept = tokens[: max(0, len(tokens) - over)]
            cut, passage = cut + len(tokens) - len(kept), self.words.decode(kept) if kept else ""
            ids, weights = self._encode(passage, query, answer)
            over = len(ids) - self.spec.seq_length
        if not weights[1:].any():
            raise ValueError("no token of the answer is left to predict")
        return Example(ids, weights, cut)

    def _encode(self, passage: str, query: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        texts, text, span = {"passage": passage, "query": query, "answer": answer}, "", (0, 0)
        for literal, name, _, _ in Formatter().parse(self.template):
            text += literal
            if name is not None:
                span = (len(text), len(text) + len(texts[name])) if name == "answer" else span
                text += texts[name]
        ids, offsets = self.words.encode_with_offsets(text)
        return ids, weights_of(offsets, [(*span, 1.0)])

    def scores(self, examples: Sequence[Example]) -> np.ndarray | None:
        """Mean log-probability of each answer's tokens, in nats; on rank 0, float32 [n]."""
        plan = RowPlan.of([len(one.ids) for one in examples], self.spec, self.ctx.dp)

        def batches() -> Iterator[Batch]:
            for packs in plan.micro_batches(self.ctx.dp_rank):
                answers = [[(examples[n].ids, examples[n].weights) for n in pack] for pack in packs]
                made = [pack_answers(pack, self.spec.seq_length, pad=0) for pack in answers]
                yield Batch.of(collate(made), self.ctx.platform.device)

        objective = AnswerLogProbabilities()
        with self.engine.evaluation():
            samples = self.engine.forward(batches(), objective, plan.count).samples
        gathered = self.ctx.gather_to_main(
            (self.ctx.dp_rank, samples[objective.metric].float().cpu().numpy()) if samples else None
        )
        if not self.ctx.is_main:
            return None
        sums = np.empty(len(examples), dtype=np.float32)
        for dp_rank, own in (entry for entry in gathered if entry is not None):
            sums[plan.order(dp_rank)] = own
        return sums / np.array([np.count_nonzero(one.weights[1:]) for one in examples], dtype=np.float32)


def check_template(template: str) -> None:
    """Check that a template has the three fields, once each, and ends with the answer.

    Raises:
        ConfigError: it does not.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"--template {template!r}: {error}") from None
    if sorted(names) != sorted(FIELDS) or not template.endswith("{answer}"):
        raise ConfigError(
            f"--template {template!r}: needs {{passage}}, {{query}} and {{answer}}, once each, and ends with {{answer}}"
        )


def answer_of(record: dict[str, Any], key: str) -> str:
    """The answer of a record: a text, or the first of a list.

    Raises:
        ValueError: there is none, or it is empty.
    """
    found = record.get(key)
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"has no answer in {key!r}: name the field with --answer")
    return found.strip()


def score_file(
    teacher: Teacher, path: Path, out: Path, *, made_from: dict[str, Any], answer: str, overwrite: bool
) -> tuple[int, int] | None:
    """Write the records of a file with pos_scores and neg_scores. All ranks call it.

    Records go to OUT.partial, block by block; a call that was interrupted goes on behind them.

    Args:
        made_from: what the scores depend on beside the file: the weights, the layout.
        answer: key of a record's answer.

    Returns:
        On rank 0, records and passages that are scored; None on the others.

    Raises:
        DataError: on every rank: a record has no group or no answer, or does not fit a row; or `out` is there.
    """
    ctx = teacher.ctx
    found = agree(ctx, lambda: list(read_records(path)))
    blocks = [found[start : start + BLOCK] for start in range(0, len(found), BLOCK)]
    stat = path.stat()
    made_from = {**made_from, "input": [str(path), stat.st_size, stat.st_mtime_ns], "answer": answer}
    made_from |= {"template": teacher.template, "seq_length": teacher.spec.seq_length, "block": BLOCK}
    file = agree(ctx, lambda: ScoredFile(out, made_from, overwrite=overwrite) if ctx.is_main else None)
    done, passages = int(ctx.broadcast(file.done if file is not None else 0)), 0
    for block in blocks[done:]:
        examples = agree(ctx, lambda block=block: _examples(teacher, path, block, answer))
        teacher.cut += sum(one.cut > 0 for one in examples)
        scores, passages = teacher.scores(examples), passages + len(examples)
        if file is not None:
            file.add(list(_scored(block, required(scores, "scores on rank 0"))))
    if file is None:
        return None
    file.close()
    return len(found), passages


def _examples(teacher: Teacher, path: Path, block: Sequence[tuple], answer: str) -> list[Example]:
    examples = []
    for record, group, line in block:
        try:
            own = answer_of(record, answer)
            examples += [teacher.example(text, group.query, own) for text in group.positives + group.negatives]
        except ValueError as error:
            raise DataError(f"{path}:{line}: {error}") from None
    return examples


def _scored(block: Sequence[tuple], scores: np.ndarray) -> Iterator[dict[str, Any]]:
    """The records with the texts that count, and a score of each."""
    first = 0
    for record, group, _ in block:
        middle, last = first + len(group.positives), first + len(group.positives) + len(group.negatives)
        kept = {name: value for name, value in record.items() if name not in SCORE_KEYS}
        values = [round(float(score), 6) for score in scores[first:last]]
        texts = {"pos": group.positives, "neg": group.negatives}
        cut = middle - first
        yield {**kept, **texts, "pos_scores": values[:cut], "neg_scores": values[cut:]}
        first = last


class ScoredFile:
    """A file of records that is written block by block; see Progress.

    Attributes:
        done: blocks that an interrupted call has written.
    """

    def __init__(self, path: Path, made_from: dict[str, Any], *, overwrite: bool) -> None:
        self._progress = Progress(path, made_from, overwrite=overwrite)
        found = self._progress.found or {"blocks": 0, "bytes": 0}
        self.done = found["blocks"]
        self._file = open(self._progress.partial, "ab")  # noqa: SIM115
        self._file.truncate(found["bytes"])  # what a kill left of a block
        self._progress.note(**found)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the next block; it is on disk when this returns."""
        self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += 1
        self._progress.note(blocks=self.done, bytes=os.fstat(self._file.fileno()).st_size)

    def close(self) -> None:
        """Give the whole file its name."""
        self._file.close()
        self._progress.finish()
