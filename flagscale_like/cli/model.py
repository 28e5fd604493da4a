"""Commands that run a trained model: `evaluate` and `generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from flagscale_like.cli.base import Checkpoint, app, example, open_checkpoint
from flagscale_like.errors import ConfigError


@app.command(epilog=example("flagscale-like evaluate --hf SmolLM2-135M --data heldout.txt --pp 2"))
def evaluate(  # typer makes an option of every parameter
    data: Annotated[Path, typer.Option(help="Text (a file, a folder, jsonl, parquet) or the prefix of a .bin/.idx.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Native checkpoint: a run, or one step_* folder.")] = None,
    hf: Annotated[Path | None, typer.Option(help="Hugging Face folder, instead of --checkpoint.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder; the model's own, if left out.")] = None,
    seq_length: Annotated[int, typer.Option(help="Tokens a window.", min=1)] = 1024,
    micro_batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 1,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the computation.")] = "fp32",
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.", min=1)] = 1,
    nproc_per_node: Annotated[int | None, typer.Option(help="Ranks to start; tp*pp on CPU, one a GPU.")] = None,
) -> None:
    """Print loss and perplexity of a model on text, on any layout; under torchrun, or starting the ranks itself."""
    from flagscale_like.config import Parallel
    from flagscale_like.runtime.launch import default_processes, is_worker, launch

    if (checkpoint is None) == (hf is None):
        raise ConfigError("give --checkpoint or --hf, one of them")
    parallel = Parallel(tp=tp, pp=pp)
    processes = 1 if is_worker() else nproc_per_node or default_processes(parallel.model_parallel_size)
    if processes > 1:
        raise SystemExit(launch(processes, sys.argv[1:]))

    from flagscale_like.checkpoint.hf_folder import HfFolder
    from flagscale_like.data.stream import read_stream
    from flagscale_like.recipes.evaluate import evaluate_stream
    from flagscale_like.runtime.parallel import parallel_context

    source, own_tokenizer = (HfFolder(hf), hf) if hf is not None else open_checkpoint(checkpoint)
    with parallel_context(parallel) as ctx:
        stream = read_stream(data, tokenizer or own_tokenizer, vocab_size=source.arch.vocab_size)
        found = evaluate_stream(
            source, stream, ctx, seq_length=seq_length, micro_batch_size=micro_batch_size, precision=precision
        )
        if ctx.is_main:
            bits = f", {found.bits_per_byte:.4f} bits a byte" if found.bits_per_byte is not None else ""
            typer.echo(f"loss {found.loss:.6f}, perplexity {found.perplexity:.4f}{bits} over {found.tokens:,} tokens")


@app.command(epilog=example("flagscale-like generate --checkpoint runs/demo --prompt 'def main(' --max-new-tokens 40"))
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder; the run's, if left out.")] = None,
) -> None:
    """Print a completion from a native checkpoint."""
    from flagscale_like.config import Parallel
    from flagscale_like.data.tokenizer import Tokenizer
    from flagscale_like.engine.engine import Engine
    from flagscale_like.model.generate import generate
    from flagscale_like.model.spec import ModelSpec
    from flagscale_like.runtime.parallel import parallel_context

    reader, found_tokenizer = open_checkpoint(checkpoint)
    folder = tokenizer or found_tokenizer
    if folder is None:
        raise ConfigError("the run names no tokenizer: give --tokenizer FOLDER")
    words = Tokenizer(folder)
    ids = words.encode_batch([prompt])[0] or [words.eod]
    with parallel_context(Parallel()) as ctx:
        model = Engine.build(ModelSpec(arch=reader.arch), ctx, source=reader).model
        new = generate(
            model, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=words.eod, seed=seed
        )
    typer.echo(prompt + words.decode(new))
