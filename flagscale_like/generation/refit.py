"""Weights from the layout of training to the layout of generation, in memory: each rank receives what it lacks.

Both layouts are described as a checkpoint's (checkpoint.fragments): pieces of global tensors. Which rank sends which part of
which piece follows from the pieces of all ranks, once. Then every update of the weights is an all-to-all, or several where
the weights are larger than a buffer.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flagscale_like.checkpoint.fragments import Fragment, Index, elements_within, overlaps
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.shards import Piece, parameter_pieces
from flagscale_like.errors import ConfigError
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.model.build import LanguageModel, build_chunks
from flagscale_like.runtime.parallel import ParallelContext, whole_on_each_rank

BUFFER_BYTES = 512 << 20  # what a rank receives at a time
EXCHANGE_STEPS = 32  # tokens of a text between two times that ranks tell each other which texts have ended

Held = tuple[nn.Parameter, Piece]


@dataclass(frozen=True)
class Part:
    """A box of a global tensor that one rank gives to another.

    Attributes:
        giver, taker: the ranks.
        given, taken: numbers of the giver's and of the taker's piece.
        low, high: its first corner and its end.
    """

    giver: int
    given: int
    taker: int
    taken: int
    low: Index
    high: Index

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(b - a for a, b in zip(self.low, self.high, strict=True))


class Refit:
    """Copies the weights of one model's chunks to another's, of another layout. All ranks make it and call it.

    Args:
        source, target: models of one architecture, each with the context of its layout.
        buffer_bytes: what a rank receives at a time.

    Attributes:
        received: elements that this rank gets from others in a copy.
    """

    def __init__(
        self,
        source: Sequence[LanguageModel],
        source_ctx: ParallelContext,
        target: Sequence[LanguageModel],
        target_ctx: ParallelContext,
        *,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.rank = source_ctx.rank
        self.has, self.wants = held_by(source, source_ctx), held_by(target, target_ctx)
        offers = source_ctx.gather([piece.box for _, piece in self.has])
        asks = source_ctx.gather([piece.box for _, piece in self.wants])
        self.names = [[fragment.key for fragment in of] for of in offers]
        parts = list(_parts(offers, asks))
        _check(parts, asks, {name: p.shape for name, p in target[0].spec.table.items()})
        self.received = sum(part.numel for part in parts if part.taker == self.rank != part.giver)
        self.own = [part for part in parts if part.giver == part.taker == self.rank]
        # The same order on every rank, and a round is over on all of them before the next one begins.
        dtypes = {piece.box.key: parameter.dtype for parameter, piece in self.has}
        dtypes = {name: dtype for of in source_ctx.gather(dtypes) for name, dtype in of.items()}
        self.rounds = list(_rounds([p for p in parts if p.giver != p.taker], offers, dtypes, buffer_bytes))

    @torch.no_grad()
    def __call__(self) -> None:
        """Copy the weights as they are now."""
        for part in self.own:
            self._place(part).copy_(self._source(part))
        for dtype, parts in self.rounds:
            self._exchange(dtype, parts)

    def _exchange(self, dtype: torch.dtype, parts: Sequence[Part]) -> None:
        world, device = dist.get_world_size(), self.wants[0][0].device
        sent = [part for part in parts if part.giver == self.rank]
        got = [part for part in parts if part.taker == self.rank]
        sent.sort(key=lambda part: part.taker)
        got.sort(key=lambda part: part.giver)
        empty = torch.empty(0, dtype=dtype, device=device)
        outgoing = torch.cat([empty, *(self._source(part).reshape(-1) for part in sent)])
        to, of = [0] * world, [0] * world
        for part in sent:
            to[part.taker] += part.numel
        for part in got:
            of[part.giver] += part.numel
        incoming = torch.empty(sum(of), dtype=dtype, device=device)
        dist.all_to_all_single(incoming, outgoing, of, to)
        for part, flat in zip(got, incoming.split([part.numel for part in got]), strict=True):
            place = self._place(part)
            place.copy_(flat.view(place.shape))

    def _source(self, part: Part) -> Tensor:
        return _view(self.has[part.given], part)

    def _place(self, part: Part) -> Tensor:
        return _view(self.wants[part.taken], part)


def held_by(models: Iterable[LanguageModel], ctx: ParallelContext) -> list[Held]:
    """A rank's parameters and their pieces, in one order."""
    return [(p, piece) for model in models for p, pieces in parameter_pieces(model, ctx).items() for piece in pieces]


def _view(held: Held, part: Part) -> Tensor:
    """A part's elements in a parameter, which they change."""
    parameter, piece = held
    (box,) = piece.box.boxes()
    return box.view(parameter.detach().view(-1)[piece.start : piece.start + piece.box.numel])[
        box.slices(part.low, part.high)
    ]


def _parts(offers: Sequence[Sequence[Fragment]], asks: Sequence[Sequence[Fragment]]) -> Iterator[Part]:
    """What each rank gets from which. Of ranks with the same piece the taker itself gives it, or else they share the work."""
    owners: dict[str, dict[Fragment, list[tuple[int, int]]]] = defaultdict(dict)
    for rank, fragments in enumerate(offers):
        for number, fragment in enumerate(fragments):
            # Ranks may pad the vocabulary differently, but not within one layout.
            owners[fragment.key].setdefault(fragment, []).append((rank, number))
    for taker, fragments in enumerate(asks):
        for taken, wanted in enumerate(fragments):
            for number, (fragment, ranks) in enumerate(owners[wanted.key].items()):
                for _, _, low, high in overlaps(fragment, wanted):
                    mine = next((owner for owner in ranks if owner[0] == taker), None)
                    giver, given = mine or ranks[(taker + number) % len(ranks)]
                    yield Part(giver, given, taker, taken, low, high)


def _check(parts: Iterable[Part], asks: Sequence[Sequence[Fragment]], shapes: dict[str, Index]) -> None:
    """Refuse a source that does not have every element of the target (but for the rows that pad the vocabulary)."""
    found: dict[tuple[int, int], int] = defaultdict(int)
    for part in parts:
        found[part.taker, part.taken] += part.numel
    for taker, fragments in enumerate(asks):
        for taken, wanted in enumerate(fragments):
            needed = elements_within(wanted, shapes[wanted.key]) if wanted.key in shapes else wanted.numel
            if found[taker, taken] < needed:
                raise ConfigError(
                    f"{wanted.key}: the model that is trained has not all of it: it is of another architecture"
                )


def _rounds(
    parts: Iterable[Part], offers: Sequence[Sequence[Fragment]], dtypes: dict[str, torch.dtype], most: int
) -> Iterator[tuple[torch.dtype, list[Part]]]:
    """Parts of one dtype, so many that no rank receives or sends more than `most` bytes (but for one part that is larger)."""
    by_dtype: dict[torch.dtype, list[Part]] = defaultdict(list)
    for part in parts:
        by_dtype[dtypes[offers[part.giver][part.given].key]].append(part)
    for dtype, of in by_dtype.items():
        some, bytes_of = [], defaultdict(int)
        for part in sorted(of, key=lambda p: (offers[p.giver][p.given].key, p.low, p.taker)):
            size = part.numel * dtype.itemsize
            ends = (("to", part.taker), ("from", part.giver))
            if some and any(bytes_of[end] + size > most for end in ends):
                yield dtype, some
                some, bytes_of = [], defaultdict(int)
            some.append(part)
            for end in ends:
                bytes_of[end] += size
        if some:
            yield dtype, some


class RefitEngine(OwnEngine):
    """Generates with a whole copy of the model on each rank, whatever the layout of training is.

    Ranks that share a model or its rows in training (tp, pp, cp) share its prompts: each draws the texts of some, and every
    EXCHANGE_STEPS steps all get the rollouts that have ended. load() brings the trainer's weights over; sleep() gives their
    memory back.

    Args:
        trained: the engine that is trained.
        options: OwnEngine's.
    """

    has_copy = True

    def __init__(self, trained: Engine, **options: Any) -> None:
        spec, ctx = trained.spec, whole_on_each_rank(trained.ctx)
        spec = dataclasses.replace(spec, parallel=Parallel(), recompute="none")
        engine = Engine(spec, ctx, build_chunks(spec, ctx))
        super().__init__(engine, version=-1, **options)
        self.trained, self.sharing = trained, _ranks_of_a_copy(trained.ctx)
        with torch.no_grad():  # rows that pad the vocabulary come from nowhere
            for parameter in engine.model.parameters():
                parameter.zero_()
        self.refit, self._asleep = Refit(trained.models, trained.ctx, engine.models, ctx), {}

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the trainer's weights as they are now. `weights` is not read. All ranks call it."""
        self.wake()
        with self.trained.evaluation():  # its parameters are whole
            self.refit()
        self.version = version

    def generate_each(self, asked: Sequence[tuple[Prompt, Sampling]]) -> Iterator[Rollout]:
        """See OwnEngine. The rollouts come in one order on all ranks that share them.

        Raises:
            ConfigError: also without weights, before the first load() and after sleep().
        """
        if self.version < 0:
            raise ConfigError("the generation model has no weights: load() them first")
        self._check_all(asked)
        return self._shared(asked)

    def _shared(self, asked: Sequence[tuple[Prompt, Sampling]]) -> Iterator[Rollout]:
        rank, ranks = self.sharing.rank(), self.sharing.size()
        if ranks == 1:
            yield from self._generate(asked)
            return
        parts, found = self._parts(asked[rank::ranks], EXCHANGE_STEPS), [None] * ranks
        while True:
            dist.all_gather_object(
                found, next(parts, None), group=self.sharing
            )  # None: all of a rank's texts have ended
            if not any(part is not None for part in found):
                return
            yield from (rollout for part in found for rollout in part or ())

    def sleep(self) -> None:
        """Give back the memory of the weights, keys and values. Afterwards load() has to bring the weights again."""
        super().sleep()
        for parameter in self.engine.model.parameters():
            self._asleep.setdefault(parameter, parameter.shape)
            parameter.data = parameter.new_empty(0)
        self.version = -1

    def wake(self) -> None:
        """Take the memory of the weights again; they are those of the next load()."""
        for parameter, shape in self._asleep.items():
            parameter.data = parameter.new_zeros(shape)
        self._asleep.clear()


def _ranks_of_a_copy(ctx: ParallelContext) -> dist.ProcessGroup:
    """The group of the ranks that work on the same rollouts in training. All ranks call it."""
    if ctx.layout.cp == 1:
        return ctx.groups.mp
    ranks = [rank for rank, copy in enumerate(ctx.gather(ctx.dp_rank)) if copy == ctx.dp_rank]
    return dist.new_group(ranks, use_local_synchronization=True)
