"""A reward model as a reward: an engine with a value head, on the layout of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from flagscale_like.checkpoint.companions import fingerprint
from flagscale_like.checkpoint.format import is_embedder, value_heads_of
from flagscale_like.checkpoint.opened import Opened, open_adapted
from flagscale_like.config import ModelReward
from flagscale_like.data.chat import BadConversationError, ChatTokenizer, read_template
from flagscale_like.data.pairs import pack_answers
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError, ConfigError, DataError
from flagscale_like.model.spec import ModelSpec, layout_beside
from flagscale_like.objectives.reward import AnswerRewards
from flagscale_like.rl.answers import Answer, Score
from flagscale_like.rl.rewards.checked import checked_values, show
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.answers import item_values, own_values

Tokens = Callable[[Answer], Sequence[int]]


class RewardModel:
    """Scores answers by an engine with a value head. All ranks call it alike, on any layout.

    Args:
        engine: its rows have room for every answer with its prompt.
        tokens: what the model reads of an answer.

    Attributes:
        engine: see above; a renewed one may take its place.
    """

    def __init__(self, engine: Engine, tokens: Tokens, *, name: str = "reward model") -> None:
        self.engine, self.tokens, self.name = engine, tokens, name

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """See RewardSource. The value is the mean over the heads.

        Raises:
            DataError: an answer is longer than a row, has a token that the model does not know, or its score is not finite.
        """
        if not answers:
            return []
        items = self._items(answers)
        values = item_values(self.engine, items, AnswerRewards())
        return self._scores(answers, self.engine.ctx.broadcast(values))

    def own_scores(self, answers: Sequence[Answer]) -> list[Score] | None:
        """The scores of the answers of one copy of the policy; its ranks alone call it, where copies share no experts.

        Returns:
            On the ranks that training.answers.own_values() names; None on the others.

        Raises:
            DataError: see scores(); a score that is not finite on those ranks alone.
        """
        values = own_values(self.engine, self._items(answers), AnswerRewards())
        return None if values is None else self._scores(answers, values)

    def places(self, answer: Answer) -> int:
        """Places of a row that an answer takes."""
        return len(self.tokens(answer))

    def _items(self, answers: Sequence[Answer]) -> _Answers:
        ids = [np.asarray(self.tokens(answer), dtype=np.int64) for answer in answers]
        room, known = self.engine.spec.seq_length, self.engine.spec.arch.vocab_size
        for number, own in enumerate(ids):
            if not 0 < len(own) <= room:
                raise DataError(
                    f"{self.name}: {len(own)} tokens, and a row has {room} places, for {show(answers, number)}"
                )
            if own.max() >= known:
                raise DataError(
                    f"{self.name}: token {own.max()} of a vocabulary of {known}, for {show(answers, number)}"
                )
        return _Answers(ids, room)

    def _scores(self, answers: Sequence[Answer], values: np.ndarray) -> list[Score]:
        heads = values.reshape(len(answers), -1)
        means = checked_values(answers, heads.mean(-1, dtype=np.float64).tolist(), self.name)
        return [Score(mean, tuple(own)) for mean, own in zip(means, heads.tolist(), strict=True)]


class _Answers:
    """Answers as the items of rows; see training.answers."""

    def __init__(self, ids: list[np.ndarray], length: int) -> None:
        self.ids, self.length = ids, length
        self.sizes = [len(own) for own in ids]

    def row(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The row of these answers."""
        return pack_answers([(self.ids[n], np.ones(len(self.ids[n]))) for n in numbers], self.length, pad=0)


def build_reward_model(
    options: ModelReward,
    ctx: ParallelContext,
    *,
    seq_length: int,
    tokenizer: Path | None,
    say: Callable[[str], None] = print,
) -> RewardModel:
    """Load a reward model on the layout of the run. All ranks call it.

    Args:
        seq_length: places of its rows.
        tokenizer: the policy's tokenizer folder.

    Raises:
        CheckpointError: the weights are not of a reward model, or cannot be read.
        ConfigError: the reward model has another tokenizer than the policy, and `tokenizer: same` is asked for.
    """
    if options.path is None:
        raise ConfigError(
            "rl.reward.path is not given: name a reward model, or give rl.rounds, whose first round makes one"
        )
    path = Path(options.path)
    opened = open_adapted(path, adapter=Path(options.adapter) if options.adapter else None)
    heads = check_is_reward_model(opened)
    tokens, note = tokens_of(options, opened, tokenizer)
    for line in (*opened.notes, *([note] if note else [])):
        say(line)
    spec = ModelSpec(
        arch=opened.source.arch,
        head="value",
        value_heads=heads,
        parallel=layout_beside(opened.source.arch, ctx.layout),
        precision=options.precision,
        seq_length=seq_length,
        micro_batch_size=options.micro_batch_size,
        lora=getattr(opened.source, "lora", None),
    )
    return RewardModel(
        Engine.build(spec, ctx, source=opened.source), tokens, name=f"reward model {opened.source.folder}"
    )


def check_is_reward_model(opened: Opened) -> int:
    """How many heads a reward model has.

    Raises:
        CheckpointError: the weights are of another role.
    """
    source = opened.source
    heads = value_heads_of(source)
    if not heads:
        role = "an embedding model" if is_embedder(source) else "a language model"
        raise CheckpointError(
            f"{source.folder}: is {role}, not a reward model: train one with objective.kind reward, or give another path"
        )
    return heads


def tokens_of(options: ModelReward, opened: Opened, tokenizer: Path | None) -> tuple[Tokens, str]:
    """What a reward model reads of an answer, and a line about it; empty where there is nothing to say."""
    own, policy, folder = fingerprint(opened.tokenizer), fingerprint(tokenizer), opened.source.folder
    if options.tokenizer == "text":
        if opened.tokenizer is None:
            raise ConfigError(
                f"{folder}: has no tokenizer, and reward.tokenizer is text: give reward.tokenizer same, or weights with one"
            )
        return _of_text(opened.tokenizer), (
            f"the texts of answers are tokenised again for {folder}, by {opened.tokenizer}"
            + (", the policy's tokenizer too" if own is not None and own == policy else "")
        )
    if own is not None and policy is not None and own != policy:
        raise ConfigError(
            f"{folder}: the reward model has another tokenizer ({opened.tokenizer}) than the policy ({tokenizer}), whose "
            "tokens it would misread: give reward.tokenizer text, which tokenises the texts again, or another reward model"
        )
    unknown = "the reward model" if own is None else "the policy" if policy is None else ""
    note = f"not verified that {folder} has the policy's tokenizer: {unknown} comes without one" if unknown else ""
    return (lambda answer: [*answer.prompt_ids, *answer.ids]), note


def _of_text(folder: Path) -> Tokens:
    """Tokens of an answer's text: by the chat template, where the prompt is a chat and the tokenizer has a template."""
    plain = Tokenizer(folder)
    chat = ChatTokenizer(folder, train="last") if read_template(folder) is not None else None

    def tokens(answer: Answer) -> Sequence[int]:
        ended = answer.finish != "length"
        if not answer.messages or chat is None:
            return plain.encode_batch([answer.prompt + answer.text])[0] + [plain.eod] * ended
        try:
            found = chat.encode([*map(dict, answer.messages), {"role": "assistant", "content": answer.text}])
        except BadConversationError as error:
            raise DataError(f"reward model's chat template: {error}, for {show([answer], 0)}") from None
        ids = found.ids[: int(np.flatnonzero(found.weights)[-1]) + 1].tolist()
        return ids if ended or ids[-1] != chat.end else ids[:-1]

    return tokens
