"""What a run leaves behind about the data that it reads, and what it says of it; see data.provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from flagscale_like.data.blend import counts_of, source_mark, source_use
from flagscale_like.data.draws import DrawnOrder
from flagscale_like.data.provenance import Provenance, Segment, badness, write_losses
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.data.selection import Mixture, SourcesDataset
from flagscale_like.training.metrics import Reporter
from flagscale_like.training.run import Run
from flagscale_like.training.step import StepResult

NAMED_SAMPLES = 3


class DataTrail:
    """Journal, sample losses and epochs of a run with sources; of one without, nothing."""

    def __init__(self, run: Run, dataset: Dataset, mixture: Mixture | None, reporter: Reporter) -> None:
        self.run, self.mixture, self.reporter = run, mixture, reporter
        self.run_dir, self.names = Path(run.config.run_dir), run.config.data.source_names
        self.order: Any = DrawnOrder(dataset.datasets) if isinstance(dataset, SourcesDataset) else dataset
        self.provenance = Provenance(self.order, self.names) if self.names else None

    def begin(self) -> None:
        """Note where the order goes on, and warn of sources that the plan reads more than once."""
        self._note("start")
        self._note_draw()
        if self.run.ctx.is_main and self.names and self.mixture is None:
            counts = counts_of(self.order, self.run.config.train.total_samples())
            for use in source_use(self.order.parts, self.names, counts):
                if use.epochs > 1:
                    self.reporter.say(f"warning: the plan repeats data source {use}")

    def went_back(self) -> None:
        """Note that the run went back, and leaves samples out."""
        self._note("rewind")

    def record(self, first: int, result: StepResult, *, logged: bool) -> None:
        """Note the losses of a step that read from sample `first` on, where it is logged or was not made.

        All ranks call it: of a step that was not made, the log names the worst samples.
        """
        if self.provenance is None:
            return
        self._note_draw()
        if result.updated and not logged:
            return
        ctx, step, size = self.run.ctx, self.run.progress.step, self.run.config.train.micro_batch_size
        counts = ctx.is_last_stage and ctx.tp_rank == 0
        losses = result.sample_losses() if counts else []
        if counts:
            write_losses(self.run_dir, ctx.rank, (step, first, ctx.dp_rank, ctx.dp, size), losses)
        if result.updated:
            return
        turns = MicroBatchSampler(self.run.progress.consumed, first, size, ctx.dp_rank, ctx.dp)
        read = (position for micro_batch in turns for position in micro_batch)
        mine = list(zip(losses, read, strict=False))
        worst = _worst([pair for pairs in ctx.gather(_worst(mine)) for pair in pairs])
        if ctx.is_main:
            for loss, position in worst:
                self.reporter.say(f"step {step} | {self.provenance.describe(position, loss)}")

    def end(self) -> None:
        """Say how often each source was read."""
        if self.run.ctx.is_main and self.names:
            counts = self.mixture.drawn if self.mixture else counts_of(self.order, self.run.progress.consumed)
            self.reporter.epochs(self.run.progress.step, source_use(self.order.parts, self.names, counts))

    def _note(self, event: str) -> None:
        progress, config = self.run.progress, self.run.config
        if self.run.ctx.is_main and self.provenance is not None:
            place = (progress.step, progress.consumed, progress.train_samples)
            marks = [source_mark(source.path) for source in config.data.sources]
            Segment(event, *place, self.run.ctx.world_size, config.model_dump(mode="json"), marks).append_to(
                self.run_dir
            )

    def _note_draw(self) -> None:
        """Note what dynamic selection draws the next samples by, where the noted states do not reach to them."""
        consumed = self.run.progress.consumed
        if self.mixture is None or (self.order.states and consumed < self.order.states[-1].until):
            return
        state = self.mixture.draw_state(consumed, self.run.config.train)
        self.order.note(state)
        if self.run.ctx.is_main:
            state.append_to(self.run_dir)


def _worst(losses: list[tuple[float, int]]) -> list[tuple[float, int]]:
    return sorted(losses, key=lambda pair: (badness(pair[0]), pair[1]))[:NAMED_SAMPLES]
