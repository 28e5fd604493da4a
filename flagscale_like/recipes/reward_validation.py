"""At the end of a reward model's training: what it was validated on is written beside its last checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flagscale_like.checkpoint.manifest import step_name
from flagscale_like.checkpoint.opened import open_adapted
from flagscale_like.data.pairs import PairRows, PairSource
from flagscale_like.objectives.reward import AnswerRewards
from flagscale_like.rl.validation import NAME, Validation
from flagscale_like.training.answers import item_values
from flagscale_like.training.parts import Part, Report
from flagscale_like.training.run import Start


class _Held:
    """Some pairs of a source, as the items of rows; see training.answers."""

    def __init__(self, rows: PairRows, numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, np.unique(numbers)
        self.sizes = rows.sizes[self.numbers]

    def row(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The row of these items."""
        return self.rows.row(self.numbers[list(numbers)].tolist())


class KeptValidation(Part):
    """Scores the validation split's pairs once the last step is saved, and writes rl.validation's record.

    Args:
        begun: the run's engine, store and progress.
        sources: of the validation split.
        steps: of the whole run. A run that stops earlier writes nothing.
    """

    def __init__(self, begun: Start, sources: Sequence[PairSource], steps: int) -> None:
        self.begun, self.steps = begun, steps
        self.sources = [source for source in sources if len(source.indices)]

    def finish(self, report: Report) -> None:
        """Validate and write, where a kill did not leave the record already. All ranks call it; rank 0 writes."""
        begun, ctx = self.begun, self.begun.engine.ctx
        folder = begun.store.root / step_name(begun.progress.step)
        if begun.progress.step != self.steps or not self.sources:
            return
        begun.store.finish()
        if not ctx.broadcast(folder.is_dir() and not (folder / NAME).is_file()):
            return
        found = [
            item_values(begun.engine, _Held(source.rows, source.indices), AnswerRewards(), each=2)
            for source in self.sources
        ]
        if ctx.is_main:
            values = np.concatenate([own.reshape(len(own), 2, -1) for own in found if own is not None])
            record = Validation.measure(values, "the validation split")
            record.write(folder, open_adapted(folder, adapter=None).source)
            report.say(f"validated on {record}; {folder / NAME}")
