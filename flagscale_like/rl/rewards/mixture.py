"""The weighted sum of several rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flagscale_like.rl.answers import Answer, RewardSource, Score


class WeightedSum:
    """Adds up what its sources give.

    Args:
        sources: by name; with the factor of each.
    """

    def __init__(self, sources: dict[str, tuple[float, RewardSource]]) -> None:
        self.sources = sources

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """See RewardSource."""
        return self.mixed({name: source.scores(answers) for name, (_, source) in self.sources.items()})

    def mixed(self, found: Mapping[str, Sequence[Score]]) -> list[Score]:
        """The sums, of what each source gave, by its name.

        An answer is rejected where any source rejects it; the heads are the reward model's.
        """
        mixed = []
        for number in range(len(next(iter(found.values())))):
            own = {name: scores[number] for name, scores in found.items()}
            reasons = [f"{name}: {score.reason}" for name, score in own.items() if score.reason]
            mixed.append(
                Score(
                    sum(self.sources[name][0] * score.value for name, score in own.items()),
                    heads=next((score.heads for score in own.values() if score.heads), ()),
                    rejected=any(score.rejected for score in own.values()),
                    reason="; ".join(reasons),
                    parts={name: score.value for name, score in own.items()},
                )
            )
        return mixed
