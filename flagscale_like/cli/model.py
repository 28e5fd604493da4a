"""`evaluate`: how well a trained model does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flagscale_like.cli.base import app, example, refuse_unread
from flagscale_like.cli.embed import evaluate_retrieval, open_embedder
from flagscale_like.cli.model_options import Dimensions, EmbedderOptions, Precision, shares, start_ranks
from flagscale_like.errors import ConfigError, PlatformError, required
from flagscale_like.figures import fixed

if TYPE_CHECKING:
    from flagscale_like.cli.base import OpenedWeights
    from flagscale_like.config import Parallel

MAX_DEFAULT_WINDOW = 1024  # tokens of a window of `evaluate` where no --seq-length is given


@app.command(epilog=example("flagscale-like evaluate --hf SmolLM2-135M --data heldout.txt --pp 2"))
@shares(EmbedderOptions)
def evaluate(  # typer makes an option of every parameter
    model: EmbedderOptions,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text (file, folder, jsonl, parquet), or a .bin/.idx path without suffix, also of conversations."
        ),
    ] = None,
    retrieval: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead of --data: folder with queries.jsonl, corpus.jsonl, qrels/ (BEIR) or qrels.jsonl. Repeatable."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of --data: a task of lm-evaluation-harness, or a YAML file of one; may be given several times."
        ),
    ] = None,
    seq_length: Annotated[
        int | None,
        typer.Option(help="With --data: tokens of one window of text. Default: the model's, at most 1024.", min=1),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With --retrieval: the judgements, qrels/SPLIT.tsv. Default: test.")
    ] = None,
    dimensions: Dimensions = None,
    shots: Annotated[
        int | None, typer.Option(help="With --tasks: examples before each question. Default: the task's.", min=0)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --tasks: questions of each. Default: all.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="With --tasks: also write the harness's numbers as JSON.")] = None,
    cp: Annotated[int, typer.Option(help="Context-parallel ranks: each holds a part of every window.", min=1)] = 1,
) -> None:
    """Print a model's loss and perplexity on text, its scores on tasks, or how well an embedding model finds passages.

    Text and passages are computed on any layout: the command starts the ranks, or runs as a rank of torchrun. Tasks are
    computed by one process. How texts become vectors matters for --retrieval alone.
    """
    if (data is not None) + bool(tasks) + bool(retrieval) != 1:
        raise ConfigError("give one of --data, --tasks and --retrieval")
    if data is None:
        refuse_unread("--data", seq_length=seq_length)
    if not retrieval:
        refuse_unread("--retrieval", split=split, dimensions=dimensions, **model.of_vectors())
    if not tasks:
        refuse_unread("--tasks", shots=shots, limit=limit, out=out)
    layout = model.layout(cp)
    if tasks:
        if layout.model_parallel_size > 1 or (model.nproc_per_node or 1) > 1:
            raise ConfigError("tasks are computed by one process: leave out --tp, --pp, --cp and --nproc-per-node")
        source, own_tokenizer = model.open()
        options = {"batch_size": model.micro_batch_size, "shots": shots, "limit": limit}
        _evaluate_tasks(source, model.tokenizer or own_tokenizer, tasks, model.precision, out, **options)
        return
    start_ranks(layout, model.nproc_per_node)
    if retrieval:
        with open_embedder(model, layout) as (embedder, _):
            evaluate_retrieval(embedder, retrieval, split or "test", dimensions)
        return
    _evaluate_text(model, required(data, "--data"), layout, seq_length)


def _evaluate_text(model: EmbedderOptions, data: Path, layout: Parallel, seq_length: int | None) -> None:
    """`evaluate --data`: print loss and perplexity."""
    from flagscale_like.data.conversations import conversations_at
    from flagscale_like.data.stream import read_stream
    from flagscale_like.recipes.evaluate import evaluate_conversations, evaluate_stream
    from flagscale_like.runtime.parallel import parallel_context

    source, own_tokenizer = model.open()
    limit = source.arch.longest_sequence
    seq_length = seq_length or min(source.arch.max_position_embeddings or MAX_DEFAULT_WINDOW, MAX_DEFAULT_WINDOW)
    if limit and seq_length > limit:
        raise ConfigError(
            f"the model takes at most {limit} tokens, --seq-length is {seq_length}: give --seq-length {limit}"
        )
    with parallel_context(layout) as ctx:
        options = {
            "seq_length": seq_length,
            "micro_batch_size": model.micro_batch_size,
            "precision": model.precision,
        }
        if conversations_at(prefix := str(data).removesuffix(".bin").removesuffix(".idx")):
            found = evaluate_conversations(source, prefix, ctx, **options)
        else:
            stream = read_stream(data, model.tokenizer or own_tokenizer, vocab_size=source.arch.vocab_size)
            found = evaluate_stream(source, stream, ctx, **options)
        if ctx.is_main:
            bits = f", {fixed(found.bits_per_byte)} bits a byte" if found.bits_per_byte is not None else ""
            typer.echo(
                f"loss {found.loss:.6f}, perplexity {fixed(found.perplexity)}{bits} over {found.tokens:,} tokens"
            )


def _evaluate_tasks(
    source: OpenedWeights,
    tokenizer: Path | None,
    tasks: list[str],
    precision: Precision,
    out: Path | None,
    **options: Any,
) -> None:
    """`evaluate --tasks`: print a line for each score."""
    import os
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise PlatformError("--tasks needs lm-evaluation-harness: pip install 'flagscale_like[eval]'")
    if tokenizer is None:
        raise ConfigError("the model names no tokenizer: give --tokenizer FOLDER")
    if all(task.endswith((".yaml", ".yml")) for task in tasks):  # a name asks for the hub's data, a file does not
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from flagscale_like.config import Parallel
    from flagscale_like.data.tokenizer import Tokenizer
    from flagscale_like.engine.engine import Engine
    from flagscale_like.json_files import write_json
    from flagscale_like.model.spec import ModelSpec
    from flagscale_like.recipes.tasks import lines_of, score_tasks
    from flagscale_like.runtime.parallel import parallel_context

    with parallel_context(Parallel(), alone=True) as ctx:
        spec = ModelSpec(arch=source.arch, precision=precision, lora=getattr(source, "lora", None))
        engine = Engine.build(spec, ctx, source=source)
        results = score_tasks(engine, Tokenizer(tokenizer), tasks, **options)
    if out is not None:
        write_json(out, results)
    for line in lines_of(results):
        typer.echo(line)
