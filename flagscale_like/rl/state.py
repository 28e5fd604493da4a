"""What a run of reinforcement learning keeps beside its models: the coefficient, and rollouts that wait to be learned of."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flagscale_like.generation.rollout import Rollout
from flagscale_like.rl.answers import Score
from flagscale_like.rl.scoring import Scored
from flagscale_like.training.parts import Part


class RlState(Part):
    """The state of the iterations.

    Attributes:
        coefficient: on the divergence from the reference, as it is steered.
        waiting: rollouts that were drawn before the last update and are learned from next; with rl.staleness.
        under_way: gets them from the ranks that draw them; None where none are under way.
    """

    name = "rl"
    state_rewinds = True

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self.waiting: list[Scored] | None = None
        self.under_way: Callable[[], list[Scored]] | None = None

    def collect(self) -> None:
        """Wait for what is under way. All ranks call it alike."""
        if self.under_way is not None:
            under_way, self.under_way = self.under_way, None
            self.waiting = under_way()

    def state(self) -> dict[str, Any]:
        self.collect()
        waiting = None if self.waiting is None else [_record(one) for one in self.waiting]
        return {"coefficient": self.coefficient, "waiting": waiting}

    def load(self, state: Mapping[str, Any]) -> None:
        self.coefficient = float(state["coefficient"])
        self.collect()  # given up: other rollouts take its place
        waiting: Sequence[Mapping[str, Any]] | None = state["waiting"]
        self.waiting = None if waiting is None else [_scored(record) for record in waiting]


def _record(one: Scored) -> dict[str, Any]:
    """A rollout and its score, JSON-able: numbers as base64 of int32 and float32."""
    rollout, score = one.rollout, one.score
    return {
        "prompt": rollout.prompt,
        "sample": rollout.sample,
        "finish": rollout.finish,
        "version": rollout.version,
        "group": one.group,
        "prompt_ids": _text(rollout.prompt_ids, np.int32),
        "ids": _text(rollout.ids, np.int32),
        "logprobs": _text(rollout.logprobs, np.float32),
        "raw_logprobs": _text(rollout.raw_logprobs, np.float32),
        "score": [score.value, list(score.heads), score.rejected, score.reason, dict(score.parts)],
    }


def _scored(record: Mapping[str, Any]) -> Scored:
    value, heads, rejected, reason, parts = record["score"]
    rollout = Rollout(
        prompt=int(record["prompt"]),
        sample=int(record["sample"]),
        prompt_ids=_numbers(record["prompt_ids"], np.int32),
        ids=_numbers(record["ids"], np.int32),
        logprobs=_numbers(record["logprobs"], np.float32),
        raw_logprobs=_numbers(record["raw_logprobs"], np.float32),
        finish=record["finish"],
        version=int(record["version"]),
    )
    return Scored(rollout, int(record["group"]), Score(float(value), tuple(heads), bool(rejected), reason, parts))


def _text(values: Sequence[float], dtype: type) -> str:
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode("ascii")


def _numbers(text: str, dtype: type) -> list:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).tolist()
