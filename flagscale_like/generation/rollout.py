"""What is asked of a generation engine, and what it gives: prompts, how tokens are drawn, rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are drawn.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that together have this probability (Holtzman et al. 2020).
        top_k: draw among so many of the likeliest tokens (Fan et al. 2018); 0: among all.
        stop: tokens that end a text. The one that ended it is the last token of its rollout: it was drawn like the others.
        stop_strings: texts that end a text. They stay in the rollout's tokens, and are cut from what is shown.
        seed: with a prompt's number and sample number it decides every draw, whatever else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """A text to go on with.

    Attributes:
        ids: its tokens, at least one.
        number: of the prompt, by which its draws are seeded; prompts of one call have different numbers.
        samples: how many rollouts are drawn of it; they share the prompt's keys and values.
    """

    ids: Sequence[int]
    number: int
    samples: int = 1


@dataclass
class Rollout:
    """A drawn text.

    Attributes:
        prompt: number of its prompt.
        sample: which of the prompt's samples it is, from 0.
        prompt_ids: the prompt's tokens.
        ids: the drawn tokens, with the stop token where one ended the text.
        logprobs: of each drawn token, its log-probability in the distribution that it was drawn from: after temperature,
            top-k and top-p.
        raw_logprobs: the same at the temperature alone, without top-k and top-p: what a trainer compares with.
        finish: a stop token or string ended it, or the room did.
        version: of the weights that drew it.
    """

    prompt: int
    sample: int
    prompt_ids: Sequence[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    finish: Literal["", "stop", "length"] = ""
    version: int = 0


class GenerationEngine(Protocol):
    """What draws rollouts. All ranks call every method alike.

    Attributes:
        version: of its weights; it counts the updates. -1 where it has none, and load() has to come before generate(): an
            engine with a copy of its own begins like this, and gives the copy up with sleep().
        at_once: whether the rollouts come together, when the last one has ended.
        has_copy: whether it has weights of its own on the ranks that learn, whose memory sleep() gives back: no other model
            is run before.
    """

    version: int
    at_once: bool
    has_copy: bool

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Rollout]:
        """Draw the rollouts of all prompts. Each comes as it ends, in one order on all ranks that share a model.

        Raises:
            ConfigError: a prompt leaves no room for a token.
        """
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights, by their Hugging Face names. An engine that reads the trainer's memory does not iterate them."""
        ...

    def sleep(self) -> None:
        """Give back the memory of keys and values (and of weights that are not the trainer's) until wake()."""
        ...

    def wake(self) -> None:
        """Be ready to generate again, after load() where sleep() gave up the weights."""
        ...
