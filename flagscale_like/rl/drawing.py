"""Drawing with a generation engine, while what only training needs sleeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flagscale_like.engine.asleep import TrainingMemory
from flagscale_like.generation.rollout import GenerationEngine, Prompt, Rollout, Sampling


def drawn(
    generator: GenerationEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    load: Callable[[], None] = lambda: None,
    asleep: Sequence[TrainingMemory] = (),
) -> Iterator[Rollout]:
    """Draw rollouts; each comes as the engine gives it. All ranks call it alike.

    The drawing has begun when this returns. Once the last rollout is taken, the engine sleeps and training's memory is back.

    Args:
        load: gives the engine its weights, once there is room for them.
        asleep: the memory of the engines that are trained; it sleeps meanwhile.
    """
    for memory in asleep:
        memory.sleep()
    load()
    generator.wake()
    return _taken(generator, generator.generate(prompts, sampling), asleep)


def _taken(
    generator: GenerationEngine, rollouts: Iterator[Rollout], asleep: Sequence[TrainingMemory]
) -> Iterator[Rollout]:
    yield from rollouts
    generator.sleep()
    for memory in asleep:
        memory.wake()
