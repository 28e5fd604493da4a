"""Drawing on ranks of their own, while the others learn: what each side does. See runtime.bridge.

Both worlds have the same layout of the policy. With D copies that learn and K that draw, copy k draws for the learning copies
whose numbers leave k when divided by K; where K is larger, several copies share the prompts of one that learns.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from flagscale_like.engine.engine import Engine
from flagscale_like.generation.rollout import GenerationEngine, Prompt, Rollout, Sampling
from flagscale_like.rl.drawing import drawn
from flagscale_like.runtime.bridge import Bridge
from flagscale_like.runtime.parallel import ParallelContext


@dataclass(frozen=True)
class Links:
    """Which rank has to do with which of the other world, by numbers of the launch.

    Attributes:
        twins: ranks that hold the same part of the model in the copies that this rank's copy works with.
        copies: of each of these copies, all of its ranks, its first one first.
        is_first: whether this rank speaks for its copy.
    """

    twins: list[int]
    copies: list[list[int]]
    is_first: bool

    @classmethod
    def of(cls, bridge: Bridge, ctx: ParallelContext) -> Links:
        """Make the links. All ranks of both worlds call it."""
        mine = (ctx.dp_rank, ctx.tp_rank, ctx.pp_rank)
        places = bridge.places(mine)
        learning = 1 + max(copy for rank, (copy, _, _) in places.items() if rank < bridge.first_apart)
        drawing = 1 + max(copy for rank, (copy, _, _) in places.items() if rank >= bridge.first_apart)

        def work_together(learns: int, draws: int) -> bool:
            return learns % drawing == draws if drawing <= learning else draws % learning == learns

        ranks: dict[int, list[tuple[tuple[int, int], int]]] = {}
        for rank, (copy, tp, pp) in places.items():
            pair = (copy, mine[0]) if bridge.is_apart else (mine[0], copy)
            if (rank >= bridge.first_apart) != bridge.is_apart and work_together(*pair):
                ranks.setdefault(copy, []).append(((tp, pp), rank))
        copies = [[rank for _, rank in sorted(own)] for _, own in sorted(ranks.items())]
        twins = [rank for _, own in sorted(ranks.items()) for place, rank in own if place == mine[1:]]
        return cls(twins, copies, is_first=mine[1:] == (0, 0))


def weights_of(engine: Engine) -> list[Tensor]:
    """The weights of this rank's part of the model, in an order that the layout decides."""
    return [parameter for model in engine.models for parameter in model.parameters()]


class DrawnApart:
    """The generation engine of ranks that learn: others draw for them. See GenerationEngine.

    `generate` asks at once, and the rollouts are waited for when the first is taken: what is done in between, the other ranks
    draw beside it.

    Args:
        engine: the policy.
    """

    at_once, has_copy = True, False

    def __init__(self, engine: Engine, bridge: Bridge) -> None:
        self.engine, self.bridge = engine, bridge
        self.links = Links.of(bridge, engine.ctx)
        self.version = -1

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Rollout]:
        """Ask for the rollouts of all prompts."""
        count = len(self.links.copies)
        if self.links.is_first:
            for number, copy in enumerate(self.links.copies):
                for rank in copy:
                    self.bridge.send(("draw", list(prompts[number::count]), sampling), rank)
        return self._taken()

    def _taken(self) -> Iterator[Rollout]:
        for copy in self.links.copies:
            yield from self.bridge.receive(copy[0])

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the policy's weights as they are."""
        if self.links.is_first:
            for copy in self.links.copies:
                for rank in copy:
                    self.bridge.send(("weights", version), rank)
        # A copy that draws for several gets its weights of the first of these.
        world = self.bridge.size - self.bridge.first_apart
        drawing = world // self.engine.spec.parallel.model_parallel_size
        if drawing >= self.engine.ctx.dp or self.engine.ctx.dp_rank < drawing:
            with self.engine.evaluation():  # the weights are whole
                for rank in self.links.twins:
                    self.bridge.send_tensors(weights_of(self.engine), rank)
        self.version = version

    def sleep(self) -> None:
        """Nothing lies here."""

    def wake(self) -> None:
        """Nothing lies here."""

    def close(self) -> None:
        """Let the ranks that draw end."""
        if self.links.is_first:
            for copy in self.links.copies:
                for rank in copy:
                    self.bridge.send(("end",), rank)


def draw_for_others(generator: GenerationEngine, engine: Engine, bridge: Bridge, load: Callable[[int], None]) -> None:
    """What the ranks apart do: take weights, draw what they are asked for, send it back; until they are told to end.

    Args:
        engine: takes the weights.
        load: gives them to the generator, where it does not have those of a version.

    Signals to stop are left to the ranks that learn, which tell these.

    Raises:
        PeerLostError: the ranks that learn have ended without a word.
    """
    links = Links.of(bridge, engine.ctx)
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.SIG_IGN)
    firsts, version = [copy[0] for copy in links.copies], -1
    while True:
        asked = [bridge.receive(rank) for rank in firsts]
        if asked[0][0] == "end":
            return
        if asked[0][0] == "weights":
            bridge.receive_tensors(weights_of(engine), links.twins[0])
            version, generator.version = asked[0][1], -1  # what it has is another version's, or the same again
            continue
        owner = {prompt.number: number for number, (_, prompts, _) in enumerate(asked) for prompt in prompts}
        rollouts: list[list[Rollout]] = [[] for _ in asked]
        prompts = [prompt for _, own, _ in asked for prompt in own]
        for rollout in drawn(generator, prompts, asked[0][2], load=lambda version=version: load(version)):
            rollouts[owner[rollout.prompt]].append(rollout)
        if links.is_first:
            for copy, own in zip(links.copies, rollouts, strict=True):
                for rank in copy:
                    bridge.send(own, rank)
