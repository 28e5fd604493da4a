"""What a run leaves behind about the data that it reads, and what it says of it; see data.provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from flagscale_like.config import RunConfig
from flagscale_like.data.blend import counts_of, source_mark, source_use
from flagscale_like.data.draws import DrawnOrder
from flagscale_like.data.provenance import Provenance, Segment, badness, write_losses
from flagscale_like.data.sampler import MicroBatchSampler
from flagscale_like.data.selection import Mixture, SourcesDataset
from flagscale_like.engine.engine import Outputs
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.parts import Part, Report, Step
from flagscale_like.training.plan import Progress

NAMED_SAMPLES = 3


class DataTrail(Part):
    """Journal, sample losses and epochs of a run with sources.

    Args:
        mixture: of dynamic selection; None where the order of samples is fixed.
    """

    def __init__(
        self,
        config: RunConfig,
        ctx: ParallelContext,
        progress: Progress,
        dataset: Dataset,
        mixture: Mixture | None,
    ) -> None:
        self.config, self.ctx, self.progress, self.mixture = config, ctx, progress, mixture
        self.run_dir, self.names = Path(config.run_dir), config.data.source_names
        self.order: Any = DrawnOrder(dataset.datasets) if isinstance(dataset, SourcesDataset) else dataset
        self.provenance = Provenance(self.order, self.names)

    def begin(self, report: Report) -> None:
        """Note where the order goes on, and warn of sources that the plan reads more than once."""
        self._note("start")
        self._note_draw()
        if self.ctx.is_main and self.mixture is None:
            counts = counts_of(self.order, self.config.train.total_samples())
            for use in source_use(self.order.parts, self.names, counts):
                if use.epochs > 1:
                    report.say(f"warning: this run repeats data source {use}")

    def after_rewind(self) -> None:
        self._note("rewind")

    def after(self, step: Step, report: Report) -> None:
        """Note the losses of a step that is logged or was not made; of one that was not made, name the worst samples."""
        self._note_draw()
        if step.updated and not step.plan.log:
            return
        ctx, plan, size = self.ctx, step.plan, self.config.train.micro_batch_size
        losses = mean_losses(step.outputs)
        if losses:
            place = (plan.step, plan.first_sample, ctx.dp_rank, ctx.dp, size)
            write_losses(self.run_dir, ctx.rank, place, losses)
        if step.updated:
            return
        turns = MicroBatchSampler(step.consumed, plan.first_sample, size, ctx.dp_rank, ctx.dp)
        read = (position for micro_batch in turns for position in micro_batch)
        mine = list(zip(losses, read, strict=False))
        worst = _worst([pair for pairs in ctx.gather(_worst(mine)) for pair in pairs])
        if ctx.is_main:
            for loss, position in worst:
                report.say(f"step {plan.step} | {self.provenance.describe(position, loss)}")

    def finish(self, report: Report) -> None:
        """Report how often each source was read."""
        if not self.ctx.is_main:
            return
        counts = self.mixture.drawn if self.mixture else counts_of(self.order, self.progress.consumed)
        used = source_use(self.order.parts, self.names, counts)
        report.numbers(self.progress.step, {f"data/epochs/{use.name}": use.epochs for use in used})
        for use in used:
            report.say(f"read from data source {use}")

    def _note(self, event: str) -> None:
        progress = self.progress
        if self.ctx.is_main:
            place = (progress.step, progress.consumed, progress.train_samples)
            marks = [source_mark(source.path) for source in self.config.data.sources]
            segment = Segment(event, *place, self.ctx.world_size, self.config, marks)
            segment.append_to(self.run_dir)

    def _note_draw(self) -> None:
        """Note what dynamic selection draws the next samples by, where the noted states do not reach to them."""
        consumed = self.progress.consumed
        if self.mixture is None or (self.order.states and consumed < self.order.states[-1].until):
            return
        state = self.mixture.draw_state(consumed, self.config.train)
        self.order.note(state)
        if self.ctx.is_main:
            state.append_to(self.run_dir)


def mean_losses(outputs: Outputs) -> list[float]:
    """Each sample's mean loss a token, where this rank counts them; the host waits for the device."""
    if not outputs.samples:
        return []
    return (outputs.samples["loss"] / outputs.samples["tokens"]).tolist()


def _worst(losses: list[tuple[float, int]]) -> list[tuple[float, int]]:
    return sorted(losses, key=lambda pair: (badness(pair[0]), pair[1]))[:NAMED_SAMPLES]
