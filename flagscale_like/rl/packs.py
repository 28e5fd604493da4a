"""Packs of rollouts: rows that hold several rollouts, each after its prompt, and how they are dealt to data-parallel ranks.

A rollout of p prompt tokens and t drawn ones takes p + t - 1 places, because its last token is only a label. What belongs to
a drawn token (its log-probability, advantage, value) lies at the place that predicts it: p - 1 and the t - 1 after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.best_fit import best_fit_decreasing
from flagscale_like.data.order import Row
from flagscale_like.generation.rollout import Rollout
from flagscale_like.model.spec import ModelSpec


def places_of(rollout: Rollout) -> int:
    """Places of a row that a rollout takes."""
    return len(rollout.prompt_ids) + len(rollout.ids) - 1


@dataclass(frozen=True)
class Deal:
    """Which rollouts share a row, and which rows each data-parallel rank runs.

    Attributes:
        rows: of each rank, the numbers of the rollouts in each of its rows. All ranks have as many rows, and some are empty.
        size: rows of a micro-batch.
    """

    rows: list[list[list[int]]]
    size: int

    @classmethod
    def of(cls, places: Sequence[int], spec: ModelSpec, ranks: int) -> Deal:
        """Pack rollouts into as few rows as best fit finds, and deal the rows so that the ranks have about the same work.

        The work of a row is that of its tokens and of its attention. The rows with the most work are dealt first, each to the
        rank with the least so far that has room for another.
        """
        packed = best_fit_decreasing(places, spec.seq_length)
        step = spec.micro_batch_size * (spec.parallel.pp if spec.parallel.vpp > 1 else 1)
        share = max(1, -(-len(packed) // (ranks * step))) * step
        work = [_work([places[number] for number in row], spec) for row in packed]
        dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
        done = [0.0] * ranks
        for row in sorted(range(len(packed)), key=lambda row: -work[row]):
            rank = min((r for r in range(ranks) if len(dealt[r]) < share), key=lambda r: done[r])
            dealt[rank].append(packed[row])
            done[rank] += work[row]
        return cls([rows + [[]] * (share - len(rows)) for rows in dealt], spec.micro_batch_size)

    def micro_batches(self, rank: int) -> list[list[list[int]]]:
        """Of each micro-batch of a rank, the rollouts of each row."""
        rows = self.rows[rank]
        return [rows[first : first + self.size] for first in range(0, len(rows), self.size)]


def _work(lengths: Sequence[int], spec: ModelSpec) -> float:
    """FLOPs of a row in some unit: a token's matrices, and its attention to those before it in its document."""
    arch = spec.arch
    matrices = 2.0 * (arch.hidden_size + arch.ffn_hidden_size)
    return sum(length * (matrices + length / 2) for length in lengths)


def pack(
    rollouts: Sequence[Rollout], fields: Mapping[str, Sequence[Tensor]], length: int, *, weights: str | None = None
) -> Row:
    """Put rollouts into one row.

    Args:
        fields: by name, of each rollout a number for each drawn token, [t].
        length: places of the row.
        weights: the field that is the loss mask; without it, each drawn token has weight 1.

    Returns:
        tokens and labels int64 [length]; loss_mask float32 [length]; documents int32 [d + 1], of which the last may be
        padding; extras float32 [1, length] by name, and `drawn`.
    """
    tokens = np.zeros(length, dtype=np.int64)
    labels, drawn, bounds = tokens.copy(), np.zeros(length, dtype=np.float32), [0]
    extras = {name: torch.zeros(1, length) for name in fields}
    for number, rollout in enumerate(rollouts):
        ids, start = [*rollout.prompt_ids, *rollout.ids], bounds[-1]
        stop = start + len(ids) - 1
        tokens[start:stop], labels[start:stop] = ids[:-1], ids[1:]
        first = start + len(rollout.prompt_ids) - 1
        drawn[first:stop] = 1
        for name, values in fields.items():
            extras[name][0, first:stop] = values[number]
        bounds.append(stop)
    bounds += [length] if bounds[-1] < length else []
    mask = torch.from_numpy(drawn)
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": mask if weights is None else extras.pop(weights)[0],
        "documents": torch.tensor(bounds, dtype=torch.int32),
        "extras": extras | {"drawn": mask[None].clone()},
    }


def packed_batches(
    rollouts: Sequence[Rollout],
    fields: Mapping[str, Sequence[Tensor]],
    micro_batches: Sequence[Sequence[Sequence[int]]],
    spec: ModelSpec,
    device: torch.device,
    *,
    weights: str | None = None,
) -> Iterator[Batch]:
    """A rank's micro-batches, on its device.

    Args:
        fields, weights: see pack().
        micro_batches: of each, the numbers of the rollouts in each row.
    """
    for rows in micro_batches:
        packed = [
            pack(
                [rollouts[number] for number in row],
                {name: [values[number] for number in row] for name, values in fields.items()},
                spec.seq_length,
                weights=weights,
            )
            for row in rows
        ]
        yield Batch.of(collate(packed), device)


def unpack(found: Tensor, rollouts: Sequence[Rollout], rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """By a rollout's number, what was found of each of its drawn tokens, [t].

    Args:
        found: [rows, s], of each place.
        rows: the numbers of the rollouts in each row.
    """
    parts = {}
    for row, members in enumerate(rows):
        stop = 0
        for number in members:
            start, stop = stop, stop + places_of(rollouts[number])
            first = start + len(rollouts[number].prompt_ids) - 1
            parts[number] = found[row, first:stop].clone()
    return parts
