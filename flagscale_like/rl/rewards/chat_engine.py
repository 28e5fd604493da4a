"""Asks a model of our own generation engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flagscale_like.data.chat import ChatTokenizer, read_template
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.runtime.parallel import ParallelContext


class ChatEngine:
    """A generation engine that takes questions as a user's messages, or as texts where its tokenizer has no chat template.

    All ranks call it alike. The data-parallel ranks share the questions.

    Args:
        engine: draws the answers, at temperature 0.
        tokenizer: the folder of its tokenizer.
    """

    def __init__(self, engine: OwnEngine, tokenizer: Path, ctx: ParallelContext, *, max_new_tokens: int) -> None:
        self.engine, self.ctx, self.tokenizer = engine, ctx, Tokenizer(tokenizer)
        self.chat = ChatTokenizer(tokenizer) if read_template(tokenizer) is not None else None
        ends = (self.tokenizer.eod, self.chat.end if self.chat is not None else None)
        stop = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.sampling = Sampling(max_new_tokens, temperature=0.0, stop=stop)

    def ask(self, questions: Sequence[str]) -> list[str]:
        """The answer to each question, without the token that ended it.

        Raises:
            DataError: on every rank, where a question leaves the model no room for its answer.
        """
        prompts = [Prompt(self._ids(question), number) for number, question in enumerate(questions)]
        self._check(prompts)
        mine = prompts[self.ctx.dp_rank :: self.ctx.dp]
        # A rank without questions takes part: where experts lie on several ranks, all make their steps together.
        own = {
            rollout.prompt: self.tokenizer.decode(rollout.ids) for rollout in self.engine.generate(mine, self.sampling)
        }
        found = {number: text for part in self.ctx.gather(own) for number, text in part.items()}
        return [found[number] for number in range(len(questions))]

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            try:
                self.engine.check(prompt, self.sampling)
            except ConfigError as error:
                raise DataError(
                    f"judge: of {len(prompts)} questions, {error}: give a judge that reads longer texts, or shorter answers "
                    "(rl.rollout.max_new_tokens)"
                ) from None

    def _ids(self, question: str) -> list[int]:
        text = question
        if self.chat is not None:
            text = self.chat.text([{"role": "user", "content": question}], prompt=True)
        return self.tokenizer.encode_batch([text])[0]
