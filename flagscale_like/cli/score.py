"""`score`: what a model makes of pairs of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.cli.model_options import ModelOptions, shares, start_ranks
from flagscale_like.errors import ConfigError
from flagscale_like.figures import fixed


@app.command(epilog=example("flagscale-like score --checkpoint runs/reward --pairs data/held-out --out scores.jsonl"))
@shares(ModelOptions)
def score(
    pairs: Annotated[Path, typer.Option(help="Path without suffix of the pairs that `data pairs` wrote.")],
    model: ModelOptions,
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
) -> None:
    """Score pairs: rewards of a reward model, or a language model's log-probabilities. Prints how often the chosen one wins.

    Starts the ranks, or runs as a rank of torchrun.
    """
    if reference is not None and not keep:
        raise ConfigError("--reference is kept beside the reward model: give --keep as well")
    start_ranks(model.layout(), model.nproc_per_node)
    from flagscale_like.checkpoint.adapters import open_weights
    from flagscale_like.data.conversations import longest_row
    from flagscale_like.recipes.score import score_pairs
    from flagscale_like.runtime.parallel import parallel_context

    source, _ = model.open()
    length = seq_length or longest_row(str(pairs))
    with parallel_context(model.layout()) as ctx:
        options: dict[str, Any] = {
            "seq_length": length,
            "micro_batch_size": model.micro_batch_size,
            "precision": model.precision,
        }
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
