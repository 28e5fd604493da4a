"""Prints the plan of the configured layout for `train --dry-run`, and finds the cluster that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flagscale_like.config.lora import NO_BASE
from flagscale_like.errors import ConfigError, required

if TYPE_CHECKING:
    from flagscale_like.arch import ModelArch
    from flagscale_like.cluster import ClusterSpec
    from flagscale_like.config import RunConfig
    from flagscale_like.planner.iteration import Beside, Iteration
    from flagscale_like.planner.search import Goal, Plan


def describe(config: RunConfig, ranks: int, dp: int, cluster_text: str | None, *, local: bool) -> None:
    """Print the plan of the configured layout, with expected times if the cluster is known.

    Args:
        ranks: world size.
        dp: data-parallel degree on that world size.
        cluster_text: the cluster that the user names; None for this machine.
        local: whether the ranks run on this machine.

    Raises:
        ConfigError: a rank needs more memory than the device has.
        DataError: `local` is true and the data cannot be used.
    """
    from flagscale_like.planner.report import describe_memory
    from flagscale_like.planner.search import Goal, configured_layout, evaluate

    par, train, model = config.parallel, config.train, config.model
    # What may be missing is looked for before anything is measured.
    lora = _describe_lora(config) if config.lora is not None else ""
    data = _describe_data(config, local=local) if not config.data.synthetic else ""
    cluster = find_cluster(cluster_text, config, ranks) if cluster_text or local else None
    cuda = cluster is None or cluster.device.is_gpu
    goal = Goal.of(config, cuda=cuda)
    layout = configured_layout(config, ranks, goal, cluster.device.hbm_bytes if cluster and cuda else None)
    tokens = train.total_samples() * train.seq_length
    typer.echo(_describe_model(model, par.tp))
    if lora:
        typer.echo(f"lora         {lora}")
    typer.echo(
        f"layout       {ranks} ranks = tp {par.tp} x pp {par.pp} x cp {par.cp} x dp {dp}; vpp {par.vpp}, sp {par.sp}"
        f"{f', ep {par.ep}' if model.experts else ''}{f', cp_kind {par.cp_kind}' if par.cp > 1 else ''}"
    )
    if config.rl is not None:
        _describe_rl(config, data)
        plan = evaluate(goal, layout, cluster or _nominal(ranks), overhead=cuda)
        fits(describe_iteration(config, plan, cluster, cuda=cuda), cluster)
        typer.echo("the configuration is valid")
        return
    typer.echo(
        f"batch        {train.global_batch_size} sequences of {train.seq_length} = "
        f"{layout.num_microbatches} micro-batches of {train.micro_batch_size} a rank; "
        f"bubble {layout.bubble:.1%} of the compute time"
    )
    typer.echo(f"run          {train.steps:,} steps, {tokens:,} tokens, {train.precision}")
    if data:
        typer.echo(f"data         {data}")
    plan = evaluate(goal, layout, cluster or _nominal(ranks), overhead=cuda)
    typer.echo(f"memory       planned peak on a rank of each stage\n{describe_memory(plan.memory)}")
    _print_time(plan, goal, cluster)
    typer.echo("the configuration is valid")


def _describe_rl(config: RunConfig, data: str) -> None:
    """Print what an iteration of reinforcement learning is."""
    rl, train = config.required_rl, config.train
    drawing = rl.rollout
    models = ["policy"] + ["critic"] * rl.has_critic + ["reference"] * bool(rl.kl.coefficient and config.lora is None)
    typer.echo(
        f"iteration    {train.global_batch_size} rollouts: {train.global_batch_size // drawing.samples} prompts, "
        f"{drawing.samples} of each, at most {drawing.max_new_tokens} tokens; {rl.algorithm}, "
        f"{rl.epochs * rl.minibatches} updates from rows of {train.seq_length}"
    )
    typer.echo(f"models       {', '.join(models)}; reward: {rl.reward.kind}")
    typer.echo(f"run          {train.steps:,} iterations, {train.precision}")
    typer.echo(f"data         {data}")


DRAWN_OTHERWISE = {  # by rl.rollout.engine, what the numbers do not say
    "refit": ["the seconds of drawing are those of rl.rollout.engine own: with refit no rank waits for another"],
    "vllm": ["memory and seconds of drawing are those of rl.rollout.engine own: vLLM takes rl.rollout.vllm.memory"],
}


def describe_iteration(config: RunConfig, plan: Plan, cluster: ClusterSpec | None, *, cuda: bool) -> Iteration:
    """Print memory and time of an iteration of reinforcement learning on a planned layout, and return them."""
    from flagscale_like.planner.iteration import describe_phases, describe_seconds, plan_iteration

    rewards, notes = reward_models(config)
    prompt, read = prompt_tokens(config)
    found = plan_iteration(config, plan.layout, plan.memory, rewards, prompt=prompt, cluster=cluster, cuda=cuda)
    typer.echo(f"memory       planned peak of each phase, on the rank that needs most\n{describe_phases(found)}")
    for note in [
        *notes,
        *([] if read else [f"the prompts are not read: {prompt} tokens are taken, half of their room"]),
        *DRAWN_OTHERWISE.get(config.required_rl.rollout.engine, []),
    ]:
        typer.echo(f"note         {note}")
    if cluster is None:
        typer.echo("time         not planned: give --cluster, for example 64x8xH100, for the expected seconds")
    else:
        typer.echo(f"time         on {cluster.describe()}: {describe_seconds(found)}")
    return found


def fits(found: Iteration, cluster: ClusterSpec | None) -> None:
    """Refuse an iteration that needs more memory than the device has.

    Raises:
        ConfigError: it does.
    """
    if cluster is not None and found.peak_bytes > cluster.device.hbm_bytes:
        raise ConfigError(
            f"a rank needs {found.peak_bytes / 2**30:.1f} GiB, {cluster.device.name} has "
            f"{cluster.device.hbm_bytes / 2**30:.1f}: `flagscale-like plan` finds a layout that fits"
        )


def reward_models(config: RunConfig) -> tuple[list[Beside], list[str]]:
    """The models that score a run's rollouts, and what is to be said of them."""
    from flagscale_like.checkpoint.format import value_heads_of
    from flagscale_like.checkpoint.opened import open_adapted
    from flagscale_like.config import JudgeReward, ModelReward
    from flagscale_like.config.rewards import sources_of
    from flagscale_like.errors import CheckpointError, ConversionError
    from flagscale_like.planner.iteration import Beside

    found, notes = [], []
    for one in sources_of(config.required_rl.reward):
        if not isinstance(one, ModelReward | JudgeReward) or (isinstance(one, JudgeReward) and one.path is None):
            continue
        heads = int(isinstance(one, ModelReward))
        precision = getattr(one, "precision", config.train.precision)
        arch = config.model
        try:
            source = open_adapted(Path(one.path), adapter=None).source if one.path is not None else None
            arch, heads = (source.arch, value_heads_of(source)) if source is not None else (arch, heads)
        except (CheckpointError, ConversionError) as error:
            notes.append(f"the reward's model {one.name} is taken to be as large as the policy: {error}")
        found.append(Beside(name=one.name, arch=arch, heads=heads, precision=precision))
    return found, notes


def prompt_tokens(config: RunConfig) -> tuple[int, bool]:
    """Tokens of a prompt on average, and whether they are read; half of their room where the files are not here."""
    from flagscale_like.errors import DataError
    from flagscale_like.rl.prompts import Words, read_prompts

    try:
        rows = read_prompts(config, Words(config))
    except DataError:
        return max(1, (config.train.seq_length - config.required_rl.rollout.max_new_tokens) // 2), False
    return round(sum(len(row.ids) for row in rows) / len(rows)), True


def _print_time(plan: Plan, goal: Goal, cluster: ClusterSpec | None) -> None:
    """Print the expected time of a step, where the cluster is known.

    Raises:
        ConfigError: a rank needs more memory than the cluster's device has.
    """
    from flagscale_like.planner.evidence import describe_evidence
    from flagscale_like.planner.report import describe_time

    if cluster is None:
        typer.echo("time         not planned: give --cluster, for example 64x8xH100, for the expected tokens/s")
        return
    typer.echo(f"time         on {cluster.describe()}: {describe_time(plan)}")
    if cluster.device.is_gpu:
        typer.echo(describe_evidence(plan, goal, cluster))
    if plan.peak_bytes > cluster.device.hbm_bytes:
        raise ConfigError(
            f"a rank needs {plan.peak_bytes / 2**30:.1f} GiB, {cluster.device.name} has "
            f"{cluster.device.hbm_bytes / 2**30:.1f}: `flagscale-like plan` finds a layout that fits"
        )


def _describe_model(model: ModelArch, tp: int) -> str:
    """Its parameters, and of a mixture of experts those that a token meets."""
    count, padded = model.parameter_count(), model.parameter_count(model.padded_vocab_size(tp))
    text = f"model        {count:,} parameters ({padded:,} with the padded vocabulary)"
    if model.experts is not None:
        active, experts = model.active_parameter_count(), model.experts
        text += (
            f"\nexperts      {active:,} parameters for each token: {experts.top_k} of {experts.count} experts a layer"
        )
    return text


def _describe_lora(config: RunConfig) -> str:
    """The adapters in a few words.

    Raises:
        ConfigError: a new run has no weights that they could stand beside.
    """
    from flagscale_like.checkpoint.manifest import step_folders
    from flagscale_like.run_folder import RunFolder

    lora, options = required(config.lora, "lora"), config.checkpoint
    if not (options.load or options.init_from_hf or any(step_folders(RunFolder(config.run_dir).checkpoints))):
        raise ConfigError(NO_BASE)
    kind = "".join(word for word, on in ((", rsLoRA", lora.rslora), (", DoRA", lora.dora)) if on)
    return f"rank {lora.rank}, alpha {lora.alpha:g}{kind}, {', '.join(lora.targets)}; {config.describe_parameters()}"


def _describe_data(config: RunConfig, *, local: bool) -> str:
    """Check the data and describe it in a few words. For ranks of other machines, missing data is not an error."""
    from flagscale_like.errors import DataError

    try:
        if config.data.prepare:
            return _describe_inputs(config)
        if config.data.prompts:
            from flagscale_like.rl.prompts import Words, read_prompts

            words = Words(config)
            held_out = read_prompts(config, words, config.data.eval_prompts)
            apart = f", {len(held_out)} held out" if held_out else ""
            return f"{len(read_prompts(config, words))} prompts{apart}"
        from flagscale_like.data.pretrain import check_sources  # loads torch and megatron-core

        check_sources(config)
    except DataError as error:
        if local:
            raise
        return f"not checked: {error}"
    return f"{len(config.data.sources)} sources found"


def _describe_inputs(config: RunConfig) -> str:
    """Find the text that the first step prepares, and read the tokenizer, if one is given.

    Raises:
        DataError: either is missing.
    """
    from flagscale_like.data.readers import find_inputs
    from flagscale_like.data.tokenizer import Tokenizer

    files = find_inputs(config.data.required_prepare.input)
    if config.data.tokenizer:
        Tokenizer(config.data.tokenizer)
    return f"{len(files)} files to prepare before the first step"


def _nominal(ranks: int) -> ClusterSpec:
    """A placeholder cluster for a plan whose times are not printed."""
    from flagscale_like.cluster import parse_cluster

    return parse_cluster(f"{ranks}xH100")


def find_cluster(text: str | None, config: RunConfig, ranks: int) -> ClusterSpec:
    """Find the cluster that the user names, or measure `ranks` devices of this machine.

    Args:
        text: such as 64x8xH100; the device name `this`, or None, measures this machine's device.
    """
    from flagscale_like.cluster import parse_cluster

    text = text or f"{ranks}xthis"
    if not text.lower().endswith("xthis"):
        return parse_cluster(text)  # loads no torch
    from flagscale_like.runtime.platforms import get_platform
    from flagscale_like.runtime.roofline import measure_device

    platform = get_platform()
    count = parse_cluster(text.lower().replace("xthis", "xH100")).devices
    device = measure_device(platform, config.train.precision, processes=count if platform.ranks_share_device else 1)
    if device.caveat:
        typer.echo(device.caveat)
    return parse_cluster(text, this_device=device)
