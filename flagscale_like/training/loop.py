"""The training loop. It decides nothing by itself: plans, verdicts and parts do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import Outputs
from flagscale_like.engine.objective import BatchObjective, Objective
from flagscale_like.errors import DivergedError, required
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.training.parts import Facts, Step, Verdict
from flagscale_like.training.plan import StepPlan, next_step
from flagscale_like.training.run import Run


@dataclass(frozen=True)
class Learned:
    """What a step learned, and what became of it."""

    outputs: Outputs
    facts: Facts
    verdict: Verdict

    @property
    def stops(self) -> bool:
        """Whether the run stops here, or goes back."""
        return self.verdict in (Verdict.STOP, Verdict.REWIND)


class Updates:
    """Optimizer steps of the run's engine, one at a call: gradients, facts, verdict, update. All ranks call it alike."""

    def __init__(self, run: Run) -> None:
        self.run, self._add_up = run, NamedSum(run.ctx)

    def __call__(self, batches: Iterator[Batch], objective: Objective | BatchObjective, count: int) -> Learned:
        """Learn from `count` micro-batches."""
        run = self.run
        outputs = run.engine.forward_backward(batches, objective, count)
        facts = facts_of(outputs, run, self._add_up)
        verdict = run.guard(facts, run.parts.judge)
        if verdict is Verdict.UPDATE:
            run.parts.before_update()
            run.engine.update(clip=run.config.optimizer.clip_grad, grad_norm=facts.grad_norm)
        return Learned(outputs, facts, verdict)

    def nothing(self, objective: Objective) -> Learned:
        """A step that has nothing to learn from: it has no loss, no parameter changes, and the parts' numbers are reduced."""
        outputs = Outputs(dict.fromkeys(("total", "count", *objective.sums), 0.0))
        return Learned(outputs, facts_of(outputs, self.run, self._add_up), Verdict.SKIP)


def run_steps(run: Run, learn: Callable[[StepPlan], Learned] | None = None, *, until: int | None = None) -> None:
    """Step until the last one, or until a rank was asked to stop; evaluate and save when the plans say so.

    Args:
        learn: what a step learns; without it, an update from the next micro-batches of the run's feed.
        until: the last step of this call; without it, of the run.

    Raises:
        DivergedError: the guard stopped the run.
        CheckpointError: a save failed, and checkpoint.on_error says stop, or it was the last one.
    """
    engine, progress = run.engine, run.progress
    if learn is None:
        learn = _next_update(run)
    while plan := next_step(run.config, run.ctx.dp, progress, first=not run.begun, until=until):
        run.parts.before(plan)
        with run.clock.step():
            learned = learn(plan)
        facts, verdict = learned.facts, learned.verdict
        progress.step, progress.consumed = plan.step, plan.first_sample + plan.batch_size
        progress.skipped += verdict is not Verdict.UPDATE
        progress.stopping, run.begun = facts.sums["stop"] > 0, True
        rate = engine.required_optimizer.param_groups[0]["lr"]
        step = Step(plan, learned.outputs, facts, verdict, progress.consumed, progress.skipped, rate)
        run.parts.after(step, run.reporter)
        for scheduler in run.schedulers:
            scheduler.step(increment=1)
        settle(run, plan, step)


def _next_update(run: Run) -> Callable[[StepPlan], Learned]:
    updates = Updates(run)

    def learn(plan: StepPlan) -> Learned:
        batches = required(run.feed, "feed").take(plan.micro_batches)
        return updates(batches, run.objective, plan.micro_batches)

    return learn


def facts_of(outputs: Outputs, run: Run, add_up: NamedSum) -> Facts:
    """The numbers of objective and parts, added up over all ranks: the one time in a step that the host waits."""
    own = {"grad-square": outputs.grad_square, **outputs.sums}
    others = run.parts.contributions(outputs)
    assert not own.keys() & others.keys(), f"a part contributes what the step counts: {own.keys() & others.keys()}"
    sums = add_up(own | others)
    count = int(sums["count"]) if math.isfinite(sums["count"]) else 0
    loss = sums["total"] / count if count else math.nan
    return Facts(loss, math.sqrt(sums["grad-square"]), count, outputs.overflow, sums)


def settle(run: Run, plan: StepPlan, step: Step) -> None:
    """What follows a step: go back or stop where the guard says so; otherwise evaluate and save what is due.

    A run that is asked to stop saves at once: it has resilience.grace_s for it, and an evaluation may take longer.
    """
    if step.verdict in (Verdict.REWIND, Verdict.STOP):
        rewind_or_stop(run, step)
        return
    stopping = run.progress.stopping
    if plan.evaluate and run.evaluate and not stopping:
        evaluate(run, "validation")
    if plan.save or (stopping and run.config.checkpoint.interval):
        save(run, final=stopping or plan.last)


def rewind_or_stop(run: Run, step: Step) -> None:
    """Rewind, or stop. The save under way is finished first."""
    run.watchdog.beat(run.progress.step, "going back", slow=True)
    run.store.finish()
    run.saves.report(run.reporter)
    reason = f"loss {step.facts.loss}, gradient norm {step.facts.grad_norm}: {run.guard.reason}"
    if step.verdict is Verdict.STOP:
        raise DivergedError(f"step {run.progress.step}: {reason}; the update was not made")
    run.reporter.say(f"step {run.progress.step} | {reason}")
    run.reporter.say(run.rewind(run.config.monitors.rewind_steps))
    run.saves.report(run.reporter)
    run.parts.after_rewind()


def evaluate(run: Run, split: str) -> None:
    """Report what the run measures on a split."""
    found, step = required(run.evaluate, "evaluate")(split), run.progress.step
    run.reporter.numbers(step, found.numbers)
    run.reporter.say(f"step {step} | {found.line}")


def save(run: Run, *, final: bool) -> None:
    """Begin a save; the last one of a start is waited for."""
    run.watchdog.beat(run.progress.step, "saving", slow=True)
    options, step = run.config.checkpoint, run.progress.step
    if run.store.busy and options.when_busy == "skip" and not final:
        run.reporter.say(f"step {step} | save skipped: one is still under way (checkpoint.when_busy is skip)")
        return
    if run.store.busy:
        run.reporter.say(f"step {step} | the save waits for the one under way")
    run.save()
    if final:
        run.saves.must_succeed = step
        run.store.finish()
    run.saves.report(run.reporter)
