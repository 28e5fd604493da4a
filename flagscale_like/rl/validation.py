"""What a reward model was validated on: kept beside its weights, for the guard on exploration (rl.guard).

`reward_validation.json` lies in the folder of the weights that it is about, and has their identity (checkpoint.adapters).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_like.checkpoint.adapters import identities, same_base
from flagscale_like.errors import CheckpointError
from flagscale_like.json_files import BAD_JSON, BAD_VALUES, write_json

NAME = "reward_validation.json"
LEVELS = np.linspace(0.0, 1.0, 201)  # of the quantiles that are kept; between two of them, a straight line
BANDS = 10


@dataclass(frozen=True)
class Band:
    """Held-out pairs whose higher score lies in [low, high): how often it is the chosen answer's."""

    low: float
    high: float
    pairs: int
    accuracy: float


@dataclass(frozen=True)
class Validation:
    """A reward model on held-out pairs.

    Attributes:
        of: what the pairs are, in words.
        accuracy: share of the pairs whose chosen answer has the higher score.
        mean, deviation: of the scores of all answers.
        scores: quantiles of the scores at LEVELS.
        disagreement: quantiles of the standard deviation over an answer's heads; empty where there is one head.
        kl: quantiles of the answers' log-ratios to the reference, in nats; empty where they are not known.
        bands: of equal numbers of pairs, by rising score.
        surprise: quantiles of the answers' surprise, minus the log-probability under the reference in nats a token; empty
            where it is not known.
    """

    of: str
    pairs: int
    accuracy: float
    mean: float
    deviation: float
    scores: tuple[float, ...]
    disagreement: tuple[float, ...]
    kl: tuple[float, ...]
    bands: tuple[Band, ...]
    surprise: tuple[float, ...] = ()

    @classmethod
    def measure(
        cls, values: np.ndarray, of: str, kl: Sequence[float] = (), surprise: Sequence[float] = ()
    ) -> Validation:
        """What the scores of held-out pairs say.

        Args:
            values: [pairs, 2, k], of the chosen and the rejected answer under k heads.
            kl: log-ratios of answers.
            surprise: of answers.

        Raises:
            CheckpointError: there are no pairs, or a score is not finite.
        """
        values = np.asarray(values, dtype=np.float64)
        if not len(values) or not np.isfinite(values).all():
            what = "a score is not finite" if len(values) else "there are no held-out pairs"
            raise CheckpointError(f"the reward model cannot be validated on {of}: {what}")
        means, heads = values.mean(-1), values.shape[-1]
        return cls(
            of=of,
            pairs=len(values),
            accuracy=float((means[:, 0] > means[:, 1]).mean()),
            mean=float(means.mean()),
            deviation=float(means.std()),
            scores=_quantiles(means),
            disagreement=_quantiles(values.std(-1)) if heads > 1 else (),
            kl=_quantiles(np.asarray(kl, dtype=np.float64)) if len(kl) else (),
            bands=tuple(_bands(means)),
            surprise=_quantiles(np.asarray(surprise, dtype=np.float64)) if len(surprise) else (),
        )

    def band_of(self, score: float) -> Band:
        """The band in which a score lies; the first or the last one for scores beyond them."""
        return next((band for band in self.bands if score < band.high), self.bands[-1])

    def write(self, folder: Path, source: Any) -> Path:
        """Write the record beside the weights. A record of other weights or an older one is replaced.

        Args:
            folder: of the weights.
            source: the same weights, opened.
        """
        path = folder / NAME
        write_json(path, {"weights": identities(source), **asdict(self)})
        return path

    @classmethod
    def read(cls, source: Any) -> Validation:
        """The record beside some weights.

        Raises:
            CheckpointError: there is none, or it is damaged, or of other weights.
        """
        path = Path(source.folder) / NAME
        way_out = f"make it with `score --checkpoint {source.folder} --pairs HELD_OUT --keep`"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: is missing, and rl.outside needs what the reward model was validated on: {way_out}, or give "
                "rl.outside.action off"
            ) from None
        except (OSError, *BAD_JSON) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}): {way_out}") from None
        try:
            weights = found.pop("weights")
            bands = tuple(Band(**band) for band in found.pop("bands"))
            given: dict[str, Any] = {k: tuple(map(float, v)) if isinstance(v, list) else v for k, v in found.items()}
            record = cls(**given, bands=bands)
            record.check()
        except BAD_VALUES as error:
            raise CheckpointError(f"{path}: is damaged ({type(error).__name__}: {error}): {way_out}") from None
        now = identities(source)
        if len(now) != len(weights) or not all(same_base(*both) for both in zip(now, weights, strict=True)):
            raise CheckpointError(f"{path}: is about other weights than those beside it: {way_out}")
        return record

    def check(self) -> None:
        """Whether the numbers can be those of measure().

        Raises:
            ValueError: they cannot.
        """
        numbers = [self.mean, self.deviation, self.accuracy, *self.scores, *self.disagreement, *self.kl, *self.surprise]
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError("a number is not finite")
        for name in ("scores", "disagreement", "kl", "surprise"):
            values = getattr(self, name)
            if (values or name == "scores") and (len(values) != len(LEVELS) or list(values) != sorted(values)):
                raise ValueError(f"{name} are not {len(LEVELS)} numbers that rise")
        if not self.bands:
            raise ValueError("there are no bands")

    def __str__(self) -> str:
        low, high = at_level(self.scores, 0.005), at_level(self.scores, 0.995)
        scores = f"99 % of the scores from {low:.3f} to {high:.3f}"
        return f"{self.pairs:,} pairs of {self.of}: accuracy {self.accuracy:.1%}, {scores}"


def at_level(values: Sequence[float], level: float) -> float:
    """A quantile of those that are kept, at a level from 0 to 1."""
    return float(np.interp(level, LEVELS, values))


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.quantile(values, LEVELS).tolist())


def _bands(means: np.ndarray) -> list[Band]:
    """Pairs by the higher of their two scores, in parts of equal size."""
    higher, right = means.max(1), means[:, 0] > means[:, 1]
    order = np.argsort(higher, kind="stable")
    parts = [part for part in np.array_split(order, min(BANDS, len(order))) if len(part)]
    lows = [float(higher[part[0]]) for part in parts]
    highs = [*lows[1:], float(higher[order[-1]])]
    return [
        Band(low, high, len(part), float(right[part].mean()))
        for low, high, part in zip(lows, highs, parts, strict=True)
    ]
