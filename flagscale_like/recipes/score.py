"""What a model makes of pairs of answers: the rewards of a reward model, or a language model's log-probabilities."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flagscale_like.checkpoint.format import value_heads_of
from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.data.conversations import answer_lengths, check_readable, conversations_at, longest_row
from flagscale_like.data.pairs import PairRows
from flagscale_like.data.table import DocumentTable
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError, required
from flagscale_like.json_files import replace_file
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.preference import AnswerLogProbabilities
from flagscale_like.objectives.reward import AnswerRewards
from flagscale_like.rl.validation import Validation
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.answers import answer_values


@dataclass(frozen=True)
class Scores:
    """Scores of pairs.

    Attributes:
        kind: `rewards` of a reward model, or a language model's `log-probabilities` of whole answers, in nats.
        values: float32 [pairs, 2, k], chosen and rejected; k heads, or 1.
    """

    kind: Literal["rewards", "log-probabilities"]
    values: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Over the heads, [pairs, 2]."""
        return self.values.mean(-1)

    @property
    def accuracy(self) -> float:
        """Share of the pairs whose chosen answer has the higher score."""
        return float((self.means[:, 0] > self.means[:, 1]).mean())

    @property
    def margin(self) -> float:
        """Mean score of the chosen answers less that of the rejected ones."""
        return float((self.means[:, 0] - self.means[:, 1]).mean())

    def surprise(self, prefix: str) -> list[float]:
        """Of each answer, minus its log-probability in nats a token: of a language model's scores of these pairs."""
        return (-self.values.reshape(-1) / answer_lengths(prefix)).tolist()

    def write(self, path: Path, prefix: str) -> None:
        """Write a JSON record for each pair: where it comes from, and the scores of both answers."""
        table, lines = DocumentTable(prefix), []
        for number, (chosen, rejected) in enumerate(self.values.tolist()):
            file, line = table.place(2 * number) or (None, None)
            record = {"file": file, "line": line, "chosen": chosen, "rejected": rejected}
            lines.append(json.dumps(record) + "\n")
        replace_file(path, "".join(lines).encode("utf-8"))

    def keep(self, source: WeightSource, prefix: str, reference: Scores | None = None) -> Path:
        """Keep beside a reward model what the scores say of it; see rl.validation.

        Args:
            reference: of the same pairs, from the language model that the policy begins as.

        Raises:
            CheckpointError: the scores are a language model's, one is not finite, or the file cannot be written; or the
                reference is a reward model.
        """
        if self.kind != "rewards":
            raise CheckpointError(f"{source.folder}: is a language model: only a reward model is validated on pairs")
        if reference is not None and reference.kind == "rewards":
            raise CheckpointError("the reference is a reward model: give the language model that the policy begins as")
        surprise = reference.surprise(prefix) if reference is not None else ()
        try:
            return Validation.measure(self.values, prefix, surprise=surprise).write(Path(source.folder), source)
        except OSError as error:
            raise CheckpointError(f"{source.folder}: the validation cannot be written: {error.strerror}") from None


def score_pairs(
    source: WeightSource,
    prefix: str,
    ctx: ParallelContext,
    *,
    seq_length: int,
    micro_batch_size: int = 1,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    temperature: float = 1.0,
) -> Scores | None:
    """Score all pairs of a prefix. All ranks call it; rank 0 gets the scores.

    Args:
        temperature: divides a language model's logits.

    Raises:
        DataError: the prefix holds no pairs, or a pair is longer than a row.
        ConfigError: the layout or the sequence length does not fit the model.
    """
    longest_row(prefix)  # refuses a prefix without pairs
    found = required(conversations_at(prefix), "pairs")
    check_readable(prefix, found, places=seq_length, vocab_size=source.arch.vocab_size)
    heads = value_heads_of(source)
    spec = ModelSpec(
        arch=source.arch,
        head="value" if heads else "language_model",
        value_heads=heads or 1,
        parallel=ctx.layout,
        precision=precision,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        lora=getattr(source, "lora", None),
        temperature=temperature,
    )
    engine = Engine.build(spec, ctx, source=source)
    pairs = PairRows(prefix, IndexedDataset(prefix), length=seq_length, pad=0)
    values = answer_values(engine, pairs, AnswerRewards() if heads else AnswerLogProbabilities())
    if values is None:
        return None
    return Scores("rewards" if heads else "log-probabilities", values.reshape(len(pairs.sizes), 2, -1))
