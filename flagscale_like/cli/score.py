"""`score`: what a model makes of pairs of answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flagscale_like.cli.base import Adapter, Force, app, example, open_model
from flagscale_like.cli.model_options import (
    HuggingFaceFolder,
    MicroBatchSize,
    ModelCheckpoint,
    PipelineParallel,
    Precision,
    RanksToStart,
    TensorParallel,
)
from flagscale_like.errors import ConfigError
from flagscale_like.figures import fixed


@app.command(epilog=example("flagscale-like score --checkpoint runs/reward --pairs data/held-out --out scores.jsonl"))
def score(  # typer makes an option of every parameter
    pairs: Annotated[Path, typer.Option(help="Path without suffix of the pairs that `data pairs` wrote.")],
    checkpoint: ModelCheckpoint = None,
    hf: HuggingFaceFolder = None,
    adapter: Adapter = None,
    force: Force = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write a JSON line for each pair, with its place and both scores.")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep beside the reward model what these pairs, which it has not seen in training, say of its scores: the "
            "guard of reinforcement learning reads it.",
        ),
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="With --keep: checkpoint or Hugging Face folder of the model that the policy begins as. What it finds "
            "likely of these answers is kept as well."
        ),
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(help="Places of a row, in which a whole pair fits. Default: the longest pair.", min=2)
    ] = None,
    micro_batch_size: MicroBatchSize = 1,
    precision: Precision = "fp32",
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    nproc_per_node: RanksToStart = None,
) -> None:
    """Score pairs: rewards of a reward model, or a language model's log-probabilities. Prints how often the chosen one wins.

    Starts the ranks, or runs as a rank of torchrun.
    """
    from flagscale_like.config import Parallel
    from flagscale_like.runtime.launch import default_processes, launch
    from flagscale_like.runtime.launched import current_launch

    if (checkpoint is None) == (hf is None):
        raise ConfigError("give either --checkpoint or --hf")
    if reference is not None and not keep:
        raise ConfigError("--reference is kept beside the reward model: give --keep as well")
    parallel = Parallel(tp=tp, pp=pp)
    processes = 1 if current_launch() else nproc_per_node or default_processes(parallel.smallest_world)
    if processes > 1:
        raise SystemExit(launch(processes, sys.argv[1:]))

    from flagscale_like.checkpoint.adapters import open_weights
    from flagscale_like.data.conversations import longest_row
    from flagscale_like.recipes.score import score_pairs
    from flagscale_like.runtime.parallel import parallel_context

    source, _ = open_model(hf or checkpoint, hugging_face=hf is not None, adapter=adapter, force=force)
    length = seq_length or longest_row(str(pairs))
    with parallel_context(parallel) as ctx:
        options = {"seq_length": length, "micro_batch_size": micro_batch_size, "precision": precision}
        found = score_pairs(source, str(pairs), ctx, **options)
        beside = score_pairs(open_weights(reference), str(pairs), ctx, **options) if reference is not None else None
        if found is None:
            return
        if out is not None:
            found.write(out, str(pairs))
        if keep:
            typer.echo(f"kept {found.keep(source, str(pairs), beside)}")
    typer.echo(
        f"{found.kind} of {len(found.values):,} pairs: the chosen answer has the higher one in {found.accuracy:.1%}, by "
        f"{fixed(found.margin)} on average" + (f"; wrote {out}" if out else "")
    )
