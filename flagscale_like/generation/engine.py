"""OwnEngine: texts drawn from the trainer's own model and weights.

Every step is one pass of the model over a pack of tokens: the next token of each text under way, and parts of prompts that
wait. A text that ends makes room for the next prompt at once. A prompt of several samples is computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError, required
from flagscale_like.generation.forward import StepForward
from flagscale_like.generation.rollout import Prompt, Rollout, Sampling
from flagscale_like.generation.sampling import Draws, check_sampling, uniforms
from flagscale_like.generation.schedule import Plan, Schedule, Text
from flagscale_like.model.kv_cache import KeyValueCache, PromptPart, cached_step

# Tokens before those of a stop string that are read with it: a token's text can depend on the one before.
STOP_MARGIN = 4


@dataclass
class Figures:
    """What an engine has done since it was made.

    Attributes:
        steps: passes of the model.
        prompt_tokens: tokens of prompts that were computed; those of a prompt of several samples once.
        new_tokens: tokens that were drawn.
    """

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


class OwnEngine:
    """Draws texts from an engine's model, on its weights as they are at the moment: nothing is copied.

    Ranks that share a model (tensor-parallel, pipeline) call every method alike and get the same rollouts. Data- and
    context-parallel ranks have texts of their own.

    Args:
        engine: a language model.
        rows: the most texts that are under way at a time.
        room: the most tokens of a text with its prompt; 0 for the longest that the model takes.
        most_tokens: of a step. Longer prompts are computed in parts.
        decode: the text of some tokens; stop strings need it.

    Attributes:
        version, at_once, has_copy: see GenerationEngine.
        figures: what was done so far.

    Raises:
        ConfigError: the model is a reward or an embedding model, or the room is more than it takes.
    """

    at_once = has_copy = False

    def __init__(
        self,
        engine: Engine,
        *,
        rows: int = 32,
        room: int = 0,
        most_tokens: int = 2048,
        decode: Callable[[Sequence[int]], str] | None = None,
        version: int = 0,
    ) -> None:
        spec = engine.spec
        if spec.head != "language_model":
            kind = {"value": "a reward or value model", "hidden": "an embedding model"}[spec.head]
            raise ConfigError(f"the model is {kind}, which has no tokens to draw: give a language model")
        longest = spec.arch.longest_sequence
        if longest and room > longest:
            raise ConfigError(f"room for {room} tokens is asked for, and the model takes {longest}: give at most those")
        if rows < 1:
            raise ConfigError(f"{rows} rows are asked for: give at least 1")
        self.room = room or longest or 2**31
        self.version, self.figures, self.decode = version, Figures(), decode
        self.engine, self.forward = engine, StepForward(engine)
        self.cache = KeyValueCache(engine.models, rows)
        self.schedule = Schedule(self.cache, max(most_tokens, rows + 1))
        self.together = engine.shared_experts

    # GenerationEngine

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Rollout]:
        """Draw the rollouts of all prompts. Each comes as it ends, in one order on all ranks that share the model.

        Between two rollouts the model may be used for forward passes, in evaluation mode. It must not be changed before the
        last one has come, or the iterator is closed.

        Raises:
            ConfigError: a prompt is empty or leaves no room for a token, numbers are repeated, or the sampling has a number
                that is out of its range.
        """
        return self.generate_each([(prompt, sampling) for prompt in prompts])

    def generate_each(self, asked: Sequence[tuple[Prompt, Sampling]]) -> Iterator[Rollout]:
        """As generate(), with each prompt's own sampling."""
        self._check_all(asked)
        return self._generate(asked)

    def _check_all(self, asked: Sequence[tuple[Prompt, Sampling]]) -> None:
        numbers = [prompt.number for prompt, _ in asked]
        if len(set(numbers)) < len(numbers):
            twice = next(number for number in numbers if numbers.count(number) > 1)
            raise ConfigError(f"two prompts have the number {twice}: it seeds their draws, give each its own")
        for prompt, sampling in asked:
            self.check(prompt, sampling)

    def _generate(self, asked: Sequence[tuple[Prompt, Sampling]]) -> Iterator[Rollout]:
        for ended in self._parts(asked):
            yield from ended

    def _parts(self, asked: Sequence[tuple[Prompt, Sampling]], steps: int = 0) -> Iterator[list[Rollout]]:
        """The rollouts that ended: as soon as there is one; with `steps`, after each so many steps, perhaps none."""
        texts = set(itertools.chain.from_iterable(self.add(prompt, sampling) for prompt, sampling in asked))
        try:
            with self.engine.evaluation():  # once: ranks have different numbers of rollouts
                left = self._any_left(bool(texts))
                while left:
                    ended: list[Rollout] = []
                    with self.forward.ready():
                        made = 0
                        while left and (made < steps if steps else not ended):
                            new = [text for text in self.step() if text.rollout.finish and text in texts]
                            texts.difference_update(new)
                            ended += [text.rollout for text in new]
                            left, made = self._any_left(bool(texts)), made + 1
                    yield ended
        finally:
            self.cancel(texts)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the version of the trainer's weights, which are this engine's. No weights are read."""
        self.version = version

    def sleep(self) -> None:
        """Give back the memory of keys and values until wake().

        Raises:
            ConfigError: texts are under way.
        """
        if self.schedule.count:
            raise ConfigError(
                f"{self.schedule.count} texts are under way: let them end, or cancel them, before sleep()"
            )
        self.cache.clear()

    def wake(self) -> None:
        """Be ready to generate again. The cache takes its memory with the first step."""

    # One step at a time: what a server does.

    def add(self, prompt: Prompt, sampling: Sampling) -> list[Text]:
        """Let the samples of a prompt wait for a row.

        Raises:
            ConfigError: see generate().
        """
        self.check(prompt, sampling)
        return self.schedule.add(prompt, sampling, self.room, self.version)

    def cancel(self, texts: Iterable[Text]) -> None:
        """Drop texts that have not ended."""
        self.schedule.drop(set(texts))

    def step(self) -> list[Text]:
        """One pass of the model, inside `forward.ready()`: draws a token of each text that is that far.

        Returns:
            The texts that got a token. Those that ended have a `rollout.finish`, and their rows are free.
        """
        plan = self.schedule.plan()
        if not plan.decoding and not plan.prompts and not plan.placed:
            self._stand_in()
            return []
        drawn = self._compute(plan)
        texts = list(self.schedule.running)
        for text, token, logprob, raw in zip(texts, *drawn, strict=True) if drawn else ():
            rollout = text.rollout
            rollout.ids.append(int(token))
            rollout.logprobs.append(logprob)
            rollout.raw_logprobs.append(raw)
            rollout.finish = self._finish(text)
        self.schedule.remove(lambda text: bool(text.rollout.finish))
        self.figures.new_tokens += len(texts)
        return texts

    def _compute(self, plan: Plan) -> list[list[float]]:
        """The draws of a plan (see sampling.draw), of the texts that then run, in the order of their rows."""
        decoding = [text.length - 1 for text in plan.decoding]
        tokens = [text.rollout.ids[-1] for text in plan.decoding]
        wanted = list(range(len(tokens)))
        for part, group in plan.prompts:
            tokens += group.prompt.ids[part.start : part.start + part.count]
            if part.start + part.count == part.length:
                wanted.append(part.at + part.count - 1)
        found = None
        if tokens:
            found = self._pass(tokens, decoding, [part for part, _ in plan.prompts], wanted)
        else:
            self._stand_in()
        logits = None
        if self.forward.stage == self.forward.stages - 1:
            first = found[: len(decoding)] if found is not None else None
            rest = iter(found[len(decoding) :].split(1) if found is not None else ())
            ends = [
                required(group.logits, "logits") if group.held is not None else next(rest)
                for group, _, _ in plan.placed
            ]
            self.schedule.computed(plan, torch.cat(ends) if ends else None)
            rows = [one.expand(len(texts), -1) for one, (_, _, texts) in zip(ends, plan.placed, strict=True)]
            logits = torch.cat([*([first] if first is not None else []), *rows]) if rows else first
        else:
            self.schedule.computed(plan, None)
        texts = self.schedule.running
        if not texts:
            return []
        random = uniforms([text.key for text in texts], [len(text.rollout.ids) for text in texts])
        return self.forward.draw(logits, Draws([text.sampling for text in texts], random))

    def _pass(
        self, tokens: Sequence[int], decoding: Sequence[int], prompts: Sequence[PromptPart], wanted: Sequence[int]
    ) -> Tensor | None:
        """The model over a step's tokens; logits after those wanted, on the last stage. None where there are none."""
        places = [*decoding, *(part.start + part.count - 1 for part in prompts)]
        self.cache.reserve(max(places) + 1, self.room)
        hidden = self.forward.hidden(tokens, cached_step(self.cache, decoding, prompts))
        self.figures.steps += 1
        self.figures.prompt_tokens += len(tokens) - len(decoding)
        return self.forward.logits(hidden, wanted) if hidden is not None and wanted else None

    def _stand_in(self) -> None:
        """Compute a token that nobody asked for, in a row without a text, where other ranks need this one's experts."""
        if self.together is not None:
            self.cache.reserve(1, self.room)
            self.forward.hidden([0], cached_step(self.cache, [], [PromptPart(0, 0, 0, 1, 1)]))

    def _any_left(self, here: bool) -> bool:
        """Whether texts are left on any rank that has to make the steps together."""
        if self.together is None:
            return here
        left = torch.tensor(int(here), device=self.cache.device)
        dist.all_reduce(left, dist.ReduceOp.MAX, group=self.together)
        return bool(left)

    def _finish(self, text: Text) -> str:
        rollout, sampling = text.rollout, text.sampling
        if rollout.ids[-1] in sampling.stop:
            return "stop"
        if sampling.stop_strings:
            longest = max(len(one.encode()) for one in sampling.stop_strings)
            end = required(self.decode, "decode")(rollout.ids[-longest - STOP_MARGIN :])
            if any(one in end for one in sampling.stop_strings):
                return "stop"
        return "length" if text.length >= text.room else ""

    def check(self, prompt: Prompt, sampling: Sampling) -> None:
        """Refuse a prompt that cannot be gone on with, or a sampling that cannot be drawn.

        Raises:
            ConfigError: see generate().
        """
        vocab = self.engine.spec.arch.vocab_size
        check_sampling(sampling, vocab)
        if sampling.stop_strings and self.decode is None:
            raise ConfigError("sampling: stop_strings need the text of tokens: give the engine `decode`")
        count = len(prompt.ids)
        if not count:
            raise ConfigError(
                f"prompt {prompt.number} is empty: give at least one token, such as the one that begins a text"
            )
        if count >= self.room:
            raise ConfigError(
                f"prompt {prompt.number} has {count} tokens, and the room is {self.room}, with the new ones"
            )
        if prompt.samples < 1:
            raise ConfigError(f"prompt {prompt.number}: {prompt.samples} samples are asked for; give at least 1")
        if not all(0 <= token < vocab for token in prompt.ids):
            raise ConfigError(
                f"prompt {prompt.number} has a token that is not below {vocab}: is it of another tokenizer?"
            )
