"""The models of a run side by side: policy, critic and reference, each an engine on the same ranks and layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flagscale_like.checkpoint.adapters import AdaptedWeights
from flagscale_like.checkpoint.adapters import open_weights as open_folder
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.config import RunConfig
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError
from flagscale_like.runtime.platforms import Platform
from flagscale_like.training.learning_rate import build_scheduler
from flagscale_like.training.run import Beside, Start, set_steps
from flagscale_like.training.weights import open_weights

CRITIC, REFERENCE = "critic", "reference"


class Reference:
    """The policy as the run began, for log-probabilities.

    Args:
        policy: the engine that is trained.
        engine: the reference's own weights; None: they are the policy's without its adapters.
        swapped: the weights of `engine` lie in host memory, and are exchanged with the policy's for the time of a scoring.

    Attributes:
        waits: whether its weights have to change places with the policy's, and cannot while the policy draws.
    """

    def __init__(self, policy: Engine, engine: Engine | None, *, swapped: bool) -> None:
        self.policy, self.engine, self.swapped = policy, engine, swapped
        self.waits = swapped
        models = engine.models if engine is not None and swapped else []
        own = [parameter for model in models for parameter in model.parameters()]
        self._kept = [_in_host_memory(parameter, policy.ctx.platform) for parameter in own]

    @contextmanager
    def scoring(self) -> Iterator[Engine]:
        """The engine that is the reference within."""
        if self.engine is None:
            with self.policy.adapters_off():
                yield self.policy
        elif self.swapped:
            self._exchange()
            try:
                yield self.policy
            finally:
                self._exchange()
        else:
            yield self.engine

    @torch.no_grad()
    def _exchange(self) -> None:
        """The policy's weights and the reference's change places, bit for bit, a parameter at a time."""
        theirs = (parameter for model in self.policy.models for parameter in model.parameters())
        for mine, other in zip(self._kept, theirs, strict=True):
            held = other.detach().to(mine.device, copy=True)
            other.data.copy_(mine)
            mine.copy_(held)


def _in_host_memory(parameter: torch.nn.Parameter, platform: Platform) -> torch.Tensor:
    """Move a parameter to host memory; returns what it holds there. Without data it keeps its device, and is empty."""
    moved = parameter.detach().cpu()
    moved = moved.pin_memory() if torch.cuda.is_available() else moved
    parameter.data = moved if platform.holds_data else parameter.detach().new_empty(0)
    return moved


@dataclass
class Models:
    """What a run holds beside its generation engine and its reward.

    Attributes:
        critic: of the values; None where the algorithm has none.
        reference: None where nothing is measured from it.
    """

    policy: Engine
    critic: Beside | None = None
    reference: Reference | None = None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it the trained models make passes, each copy as many as it likes. All ranks enter it together."""
        with ExitStack() as open_ones:
            for engine in self.trained:
                open_ones.enter_context(engine.evaluation())
            yield

    @property
    def trained(self) -> list[Engine]:
        """The engines with an optimizer."""
        return [self.policy, *([self.critic.engine] if self.critic else [])]

    @property
    def beside(self) -> list[Beside]:
        """The models that a checkpoint holds beside the policy."""
        found = [self.critic] if self.critic else []
        own = self.reference.engine if self.reference else None
        return found + ([Beside(own)] if own is not None else [])


def build_models(config: RunConfig, begun: Start) -> Models:
    """Build what the policy learns with, from the run's checkpoint or anew. All ranks call it.

    Raises:
        CheckpointError: the checkpoint lacks a model that the configuration asks for, or a source is of another role.
    """
    models = Models(begun.engine)
    if config.required_rl.has_critic:
        models.critic = _build_critic(config, begun)
    if config.required_rl.kl.coefficient:
        models.reference = _build_reference(config, begun)
    return models


def _build_critic(config: RunConfig, begun: Start) -> Beside:
    ctx, options = begun.engine.ctx, config.required_rl.critic
    spec = replace(begun.engine.spec, head="value", value_heads=1, temperature=1.0, lora=None, frozen=())
    optimizer = config.optimizer.model_copy(update={"lr": options.lr, "min_lr": _min_lr(config)})
    own = config.model_copy(update={"optimizer": optimizer})
    source = _saved(begun.reader, CRITIC, f"rl.algorithm {config.required_rl.algorithm} trains one")
    if source is not None:
        engine = Engine.build(spec, ctx, optimizer=optimizer, source=source, name=CRITIC, states=source)
    else:
        source = _source(config, begun)
        engine = Engine.build(spec, ctx, optimizer=optimizer, source=source, name=CRITIC, source_name=_name_in(source))
        where = "drawn" if source is None else f"from {source.folder}"
        begun.notes.append(f"the critic's weights are {where}{''.join(f'; {reason}' for reason in engine.left)}")
    scheduler = build_scheduler(engine.optimizer, own)
    set_steps(scheduler, begun.scheduler.num_steps)
    return Beside(engine, scheduler)


def _min_lr(config: RunConfig) -> float:
    """The critic's rate at the end of the decay: the same share of its peak as the policy's."""
    return config.required_rl.critic.lr * config.optimizer.min_lr / config.optimizer.lr


def _source(config: RunConfig, begun: Start) -> WeightSource | None:
    """The weights that a new critic begins from; None where they are drawn."""
    folder = config.required_rl.critic.load
    if folder is not None:
        return open_folder(Path(folder))
    source = open_weights(config.checkpoint, begun.engine.ctx)
    return source.base if isinstance(source, AdaptedWeights) else source


def _name_in(source: WeightSource | None) -> str:
    """What a source calls the weights that a critic begins from: a run of task rl has a critic of its own."""
    return CRITIC if isinstance(source, CheckpointReader) and source.keys(f"{CRITIC}/") else ""


def _build_reference(config: RunConfig, begun: Start) -> Reference:
    policy, memory = begun.engine, config.required_rl.kl.memory
    if config.lora is not None:
        return Reference(policy, None, swapped=False)
    spec = replace(policy.spec, frozen=())
    source = _saved(begun.reader, REFERENCE, "rl.kl.coefficient is above 0")
    engine = Engine.build(spec, policy.ctx, source=source, name=REFERENCE)
    if source is None:
        with torch.no_grad():
            for own, other in zip(engine.models, policy.models, strict=True):
                for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
                    mine.copy_(theirs)
        begun.notes.append("the reference is the policy as it is now")
    swapped = memory == "host" or (memory == "auto" and policy.ctx.platform.device.type != "cpu")
    return Reference(policy, engine, swapped=swapped)


def _saved(reader: CheckpointReader | None, name: str, why: str) -> CheckpointReader | None:
    """The checkpoint that a model goes on from.

    Raises:
        CheckpointError: there is a checkpoint, and it does not hold the model.
    """
    if reader is not None and not reader.keys(f"{name}/"):
        raise CheckpointError(
            f"{reader.folder}: holds no {name}, and {why}: go on as the run began, or begin a new run from it with "
            "checkpoint.load"
        )
    return reader
