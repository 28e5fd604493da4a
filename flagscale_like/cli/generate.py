"""`generate`: what a model makes of a prompt, or of a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flagscale_like.cli.base import Adapter, Checkpoint, Force, app, example, open_model, refuse_unread
from flagscale_like.cli.model_options import Precision, start_ranks
from flagscale_like.errors import ConfigError, required

if TYPE_CHECKING:
    from flagscale_like.cli.base import OpenedWeights
    from flagscale_like.recipes.generate import TextGenerator, Wishes

Rows = Annotated[int, typer.Option(help="Texts that are drawn at a time.", min=1)]


@app.command(epilog=example("flagscale-like generate --checkpoint runs/demo --prompt 'def main(' --max-new-tokens 40"))
def generate(  # typer makes an option of every parameter
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    chat: Annotated[
        str | None,
        typer.Option(help="A question, instead of --prompt: goes through the chat template; prints the answer."),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help="Instead: a JSONL file; each line has `prompt` or `messages`, and may have sampling options."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --batch: the JSONL file to add the answers to. What it has already is not drawn again."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="With --batch: texts of each prompt.", min=1)] = 1,
    rows: Rows = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.", min=1)] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature; 0 takes the most likely token. Default: the model's generation settings, or 0.",
            min=0.0,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens whose probabilities add up to this.", min=1e-6, max=1.0),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from so many of the most likely tokens; 0: from all.", min=0)
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer. Repeatable.")] = None,
    add_bos: Annotated[
        bool | None,
        typer.Option(
            "--add-bos/--no-add-bos",
            help="Begin --prompt with the token that begins a text. Default: as the tokenizer does.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**63 - 1)] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder. Default: the run's tokenizer.")] = None,
    adapter: Adapter = None,
    force: Force = False,
    precision: Precision = "fp32",
    tp: Annotated[int, typer.Option(help="With --batch: tensor-parallel ranks.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="With --batch: pipeline stages.", min=1)] = 1,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="With --batch: ranks to start. Default: tp*pp on a CPU, each GPU.", min=1)
    ] = None,
) -> None:
    """Print what a model makes of a prompt, its answer to a question, or write those of a file of prompts.

    The model is a checkpoint or a Hugging Face folder. With --batch, on any layout: the command starts the ranks, or runs as
    a rank of torchrun.
    """
    from flagscale_like.config import Parallel
    from flagscale_like.recipes.generate import TextGenerator, Wishes
    from flagscale_like.runtime.parallel import parallel_context

    if sum(given is not None for given in (prompt, chat, batch)) != 1:
        raise ConfigError("give one of --prompt, --chat and --batch")
    parallel = Parallel(tp=tp, pp=pp)
    if prompt is None:
        refuse_unread("--prompt", add_bos=add_bos if add_bos is None else True)
    if batch is None:
        several = {"samples": samples, "tp": tp, "pp": pp, "nproc_per_node": nproc_per_node or 1}
        refuse_unread("--batch", out=out, **{name: count > 1 for name, count in several.items()})
    else:
        start_ranks(parallel, nproc_per_node)
    source, found_tokenizer = open_model(checkpoint, adapter=adapter, force=force)
    folder = tokenizer or found_tokenizer
    if folder is None:
        raise ConfigError("the run names no tokenizer: give --tokenizer FOLDER")
    wishes = Wishes(max_new_tokens, temperature, top_p, top_k, tuple(stop or ()), seed)
    with parallel_context(parallel, alone=batch is None) as ctx:
        writer = TextGenerator(source, folder, ctx, rows=rows if batch else 1, precision=precision)
        if ctx.is_main:
            say_settings(writer, wishes)
        if batch is not None:
            _batch(writer, source, batch, out or batch.with_suffix(".answers.jsonl"), samples, wishes)
        else:
            _one(writer, prompt, chat, wishes, add_bos)


def _one(writer: TextGenerator, prompt: str | None, chat: str | None, wishes: Wishes, add_bos: bool | None) -> None:
    from flagscale_like.generation.rollout import Prompt

    if chat is not None:
        ids = writer.chat_prompt([{"role": "user", "content": chat}])
    else:
        ids = writer.prompt_of(required(prompt, "--prompt"), add_bos=add_bos)
    sampling = writer.sampling(wishes, chat=chat is not None)
    limit, count = writer.own.engine.spec.arch.longest_sequence, wishes.max_new_tokens
    if limit and len(ids) + count > limit:
        raise ConfigError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {count} exceed the model's {limit} positions: "
            f"give at most {max(0, limit - len(ids))} new ones"
        )
    (rollout,) = writer.own.generate([Prompt(ids, 0)], sampling)
    typer.echo((prompt or "") + writer.text_of(rollout, sampling))


def _batch(writer: TextGenerator, source: OpenedWeights, path: Path, out: Path, samples: int, wishes: Wishes) -> None:
    """Add the answers to a file, and say how many there are."""
    from flagscale_like.recipes.generate import answered, answers, append_line, read_rows
    from flagscale_like.runtime.parallel import agree

    ctx = writer.own.engine.ctx
    rows = read_rows(path, writer, wishes, samples, source)
    done = agree(ctx, lambda: answered(out, rows))
    ctx.barrier()  # what is there is read before anything is added
    if ctx.is_main and done:
        typer.echo(f"{out}: {len(done):,} of {len(rows) * samples:,} texts are there already", err=True)
    count = 0
    for record in answers(writer, rows, done):
        if ctx.tp_rank == 0 and ctx.pp_rank == 0:
            append_line(out, record)
            count += 1
    (count,) = ctx.sum([count])
    if ctx.is_main:
        typer.echo(f"{out}: added {count:,.0f} texts")


def say_settings(writer: TextGenerator, wishes: Wishes) -> None:
    """Say what nobody gave on the command line, and what the folder asks for that is not applied."""
    found, chosen = writer.found, writer.sampling(wishes)
    if found.temperature and wishes.temperature is None:
        typer.echo(
            f"sampling as generation_config.json says: temperature {chosen.temperature:g}, top-p {chosen.top_p:g}, top-k "
            f"{chosen.top_k}; --temperature 0 takes the likeliest tokens",
            err=True,
        )
    if found.not_applied:
        names = ", ".join(f"{name} {value}" for name, value in found.not_applied.items())
        typer.echo(f"generation_config.json also asks for {names}: not applied", err=True)
