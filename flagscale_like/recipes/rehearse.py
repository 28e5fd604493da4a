"""A dress rehearsal of a run: the recipe of pretraining, as ranks that are not there, on tokens that are made up."""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

from flagscale_like.cluster import GIB, ClusterSpec
from flagscale_like.config import Outside, RunConfig
from flagscale_like.errors import ConfigError, RehearsalError
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.report import updated_config
from flagscale_like.planner.search import USABLE, Goal, Plan, configured_layout, evaluate
from flagscale_like.recipes.benchmark import benchmark_config
from flagscale_like.recipes.pretrain import MakeParts, pretrain
from flagscale_like.recipes.reinforce import reinforce
from flagscale_like.rehearsal.choice import chosen_ranks
from flagscale_like.rehearsal.record import RankRecord
from flagscale_like.rehearsal.rehearse import Rehearsed, growing_segments, overflow_message, rehearse_rank
from flagscale_like.rehearsal.repeats import record_rank
from flagscale_like.rl.made_up import MadeUpGenerator, MadeUpReward, MadeUpWords, made_up_prompts
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.platforms import Platform
from flagscale_like.runtime.platforms.choice import candidates

STEPS = 2  # the second shows what stays
TRIES = 4  # changes of a run that does not fit that are rehearsed


def rehearse(
    config: RunConfig,
    cluster: ClusterSpec,
    kind: type[Platform],
    *,
    world_size: int,
    ranks: str = "auto",
    steps: int = STEPS,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Rehearsed]:
    """Take steps as each of some ranks of a run, one after another.

    Args:
        kind: the platform of the cluster's devices.
        ranks: see chosen_ranks().
        say: is told what the rank says while it runs.

    Raises:
        ConfigError: the world or the ranks do not fit the configuration.
        RehearsalError: see rehearse_rank().
    """
    chosen = chosen_ranks(config, world_size, ranks)
    for rank in chosen:
        with tempfile.TemporaryDirectory(prefix="flagscale-rehearsal-") as folder:
            own = rehearsal_config(config, folder, steps)
            said = StringIO()
            with redirect_stdout(said):
                found = rehearse_rank(own, cluster, kind, rank, world_size, _train)
            for line in said.getvalue().splitlines():
                say(line)
        yield found
        gc.collect()


def record(
    config: RunConfig, cluster: ClusterSpec, kind: type[Platform], *, world_size: int, ranks: str = "stages"
) -> Iterator[RankRecord]:
    """The records of rehearse(), without memory: of micro-batches that repeat, one is run. Arguments are the same."""
    for rank in chosen_ranks(config, world_size, ranks):
        with tempfile.TemporaryDirectory(prefix="flagscale-rehearsal-") as folder, redirect_stdout(StringIO()):
            yield record_rank(rehearsal_config(config, folder), cluster, kind, rank, world_size, _train)
        gc.collect()


def _train(config: RunConfig, ctx: ParallelContext, parts: MakeParts) -> None:
    if config.task == "rl":
        reinforce(
            config,
            ctx,
            make_generator=lambda *_: MadeUpGenerator(),
            make_reward=lambda *_: MadeUpReward(),
            read=lambda config, _: (MadeUpWords(), made_up_prompts(config)),
            parts=parts,
        )
    else:
        pretrain(config, ctx, parts=parts)


def rehearsal_config(config: RunConfig, folder: str, steps: int = STEPS) -> RunConfig:
    """The run on rows that are made up, for some steps, without checkpoints, and without the guard on a reward model.

    Raises:
        ConfigError: some of its ranks only draw rollouts.
    """
    if config.ranks_apart:
        raise ConfigError(
            f"rl.rollout.apart ({config.ranks_apart}): ranks that draw are not rehearsed: set rl.rollout.apart=0, and give "
            "--world-size the ranks that learn"
        )
    changes: dict[str, Any] = {"train": config.train.model_copy(update={"profile": None})}
    if config.rl is not None:
        changes["rl"] = config.rl.model_copy(update={"outside": Outside(action="off")})
    return benchmark_config(config.model_copy(update=changes), folder, steps, checkpoint=False)


def nearest_change(
    config: RunConfig,
    cluster: ClusterSpec,
    kind: type[Platform],
    found: Rehearsed,
    world_size: int,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """The least change of a run that does not fit that does: the first of planned_changes() that a rehearsal confirms.

    Args:
        say: is told what is tried.
    """
    tried: list[str] = []
    for words, plan in itertools.islice(planned_changes(config, cluster, found, world_size), TRIES):
        say(f"rehearsing {words}, which is planned to take {plan.peak_bytes / GIB:.1f} GiB")
        needed = 0.0
        try:
            for one in rehearse(updated_config(config, plan.layout), cluster, kind, world_size=world_size):
                needed = max(needed, one.needed_bytes)
                if not one.fits:
                    break
            else:
                before = f" ({', '.join(tried)})" if tried else ""
                return f"the nearest change that fits: {words} (rehearsed: fits, {needed / GIB:.1f} GiB){before}"
            tried.append(f"{words} does not: {needed / GIB:.1f} GiB")
        except RehearsalError as error:
            tried.append(f"{words} cannot be rehearsed: {error}")
    way_out = f"see `plan` for other layouts of {cluster.describe()}"
    if tried:
        return f"no change was found that fits: {'; '.join(tried)}; {way_out}"
    return f"no change of one or two settings is planned to fit: {way_out}"


def planned_changes(
    config: RunConfig, cluster: ClusterSpec, found: Rehearsed, world_size: int
) -> Iterator[tuple[str, Plan]]:
    """Changes that fit by the planner's formulas and what the rehearsal adds to them, and what is planned of each.

    Changes of one setting come before changes of two; of equals the faster comes first.
    """
    goal = Goal.of(config, cuda=cluster.device.is_gpu)
    now = configured_layout(config, world_size, goal, cluster.device.hbm_bytes)
    budget = cluster.device.hbm_bytes * USABLE - max(0.0, found.needed_bytes - found.planned.total)
    singles = _changes(now, config, world_size)
    pairs = [
        (f"{a} and {b}", both)
        for i, (a, first) in enumerate(singles)
        for b, second in singles[i + 1 :]
        if (both := _joined(now, first, second)) is not None
    ]
    for options in (singles, pairs):
        fitting: list[tuple[str, Plan]] = []
        for words, layout in options:
            try:
                updated_config(config, layout).data_parallel_size(world_size)
                plan = evaluate(goal, layout, cluster)
            except ValueError:
                continue  # the model or the batch is not divided by it
            if plan.peak_bytes <= budget:
                fitting.append((words, plan))
        yield from sorted(fitting, key=lambda option: option[1].time.seconds)


def _changes(layout: Layout, config: RunConfig, world_size: int) -> list[tuple[str, Layout]]:
    """Layouts that differ from one in one setting, and the setting in words."""
    found: list[tuple[str, Layout]] = []
    for recompute in ("selective", "full"):
        if layout.recompute == "none" or (layout.recompute, recompute) == ("selective", "full"):
            found.append((f"train.recompute={recompute}", replace(layout, recompute=recompute)))
    if layout.tp > 1 and not layout.sp:
        found.append(("parallel.sp=true", replace(layout, sp=True)))
    if layout.micro_batch_size > 1:
        half, twice = layout.micro_batch_size // 2, 2 * layout.num_microbatches
        found.append((f"train.micro_batch_size={half}", replace(layout, micro_batch_size=half, num_microbatches=twice)))
    if layout.vpp > 1:
        found.append(("parallel.vpp=1", replace(layout, vpp=1)))
    if layout.dp > 1 and layout.dp % 2 == 0:
        fewer = {"dp": layout.dp // 2, "num_microbatches": 2 * layout.num_microbatches}
        found.append((f"parallel.tp={2 * layout.tp}", replace(layout, tp=2 * layout.tp, **fewer)))
        found.append((f"parallel.pp={2 * layout.pp}", replace(layout, pp=2 * layout.pp, offload=(), **fewer)))
    return found


def _joined(base: Layout, first: Layout, second: Layout) -> Layout | None:
    """Both changes; None where they change the same thing."""
    changes = [
        {name: value for name in Layout.__dataclass_fields__ if (value := getattr(one, name)) != getattr(base, name)}
        for one in (first, second)
    ]
    return None if changes[0].keys() & changes[1].keys() else replace(base, **changes[0], **changes[1])


def check_plans(
    config: RunConfig, plans: Sequence[Plan], cluster: ClusterSpec, kind: type[Platform]
) -> Iterator[tuple[Plan, list[Rehearsed], str]]:
    """Rehearse planned layouts; gives each plan, what its ranks did, and a line on it."""
    for plan in plans:
        own = updated_config(config, plan.layout)
        found = list(rehearse(own, cluster, kind, world_size=cluster.devices))
        most = max(found, key=lambda one: one.needed_bytes)
        over = [one for one in found if not one.fits]
        if over:
            line = "; ".join(filter(None, (overflow_message(over[0], cluster), growing_segments(over))))
        else:
            line = (
                f"fits: stage {most.stage} takes {most.needed_bytes / GIB:.1f} GiB, {plan.peak_bytes / GIB:.1f} planned"
            )
        yield plan, found, f"{plan.layout.describe()}: {line}"


def rehearsed_kind(name: str) -> type[Platform]:
    """The platform of this name, whether or not this machine has its devices.

    Raises:
        ConfigError: no platform is called so.
        PlatformError: a plug-in is broken.
    """
    known = candidates()
    if name not in known:
        raise ConfigError(f"--device {name!r}: no platform is called so (known: {', '.join(known)})")
    return known[name].load()
