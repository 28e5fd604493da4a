"""`evaluate`: how well a trained model does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flagscale_like.cli.base import Adapter, Force, app, example, open_model
from flagscale_like.cli.embed import evaluate_retrieval, open_embedder
from flagscale_like.cli.model_options import (
    Dimensions,
    HuggingFaceFolder,
    ModelCheckpoint,
    ModelTokenizer,
    PassageInstruction,
    PipelineParallel,
    PoolingOption,
    Precision,
    QueryInstruction,
    TensorParallel,
)
from flagscale_like.errors import ConfigError, PlatformError
from flagscale_like.figures import fixed

if TYPE_CHECKING:
    from flagscale_like.cli.base import OpenedWeights

MAX_DEFAULT_WINDOW = 1024  # tokens of a window of `evaluate` where no --seq-length is given


@app.command(epilog=example("flagscale-like evaluate --hf SmolLM2-135M --data heldout.txt --pp 2"))
def evaluate(  # typer makes an option of every parameter
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
    split: Annotated[str, typer.Option(help="With --retrieval: the judgements, qrels/SPLIT.tsv.")] = "test",
    pooling: PoolingOption = None,
    query_instruction: QueryInstruction = None,
    passage_instruction: PassageInstruction = None,
    dimensions: Dimensions = None,
    checkpoint: ModelCheckpoint = None,
    hf: HuggingFaceFolder = None,
    adapter: Adapter = None,
    force: Force = False,
    tokenizer: ModelTokenizer = None,
    seq_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one window of text, or most tokens of a text. Default: the model's, at most 1024.", min=1
        ),
    ] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Windows of one forward pass.", min=1)] = 1,
    precision: Precision = "fp32",
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    cp: Annotated[int, typer.Option(help="Context-parallel ranks: each holds a part of every window.", min=1)] = 1,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Ranks to start. Default: one for each GPU; on a CPU, tp*pp*cp.", min=1)
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of --data: a task of lm-evaluation-harness, or a YAML file of one; may be given several times."
        ),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question. Default: the task's.", min=0)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task. Default: all.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="With --tasks: also write the harness's numbers as JSON.")] = None,
) -> None:
    """Print a model's loss and perplexity on text, its scores on tasks, or how well an embedding model finds passages.

    Text and passages are computed on any layout: the command starts the ranks, or runs as a rank of torchrun. Tasks are
    computed by one process.
    """
    from flagscale_like.config import Parallel
    from flagscale_like.runtime.launch import default_processes, launch
    from flagscale_like.runtime.launched import current_launch

    if (checkpoint is None) == (hf is None):
        raise ConfigError("give either --checkpoint or --hf")
    if (data is not None) + bool(tasks) + bool(retrieval) != 1:
        raise ConfigError("give one of --data, --tasks and --retrieval")
    if not tasks and (shots is not None or limit is not None or out is not None):
        raise ConfigError("--shots, --limit and --out belong to --tasks")
    parallel = Parallel(tp=tp, pp=pp, cp=cp)
    if tasks:
        if parallel.model_parallel_size > 1 or (nproc_per_node or 1) > 1:
            raise ConfigError("tasks are computed by one process: leave out --tp, --pp, --cp and --nproc-per-node")
        source, own_tokenizer = open_model(hf or checkpoint, hugging_face=hf is not None, adapter=adapter, force=force)
        options = {"batch_size": micro_batch_size, "shots": shots, "limit": limit}
        _evaluate_tasks(source, tokenizer or own_tokenizer, tasks, precision, out, **options)
        return
    processes = 1 if current_launch() else nproc_per_node or default_processes(parallel.smallest_world)
    if processes > 1:
        raise SystemExit(launch(processes, sys.argv[1:]))

    if retrieval:
        with open_embedder(
            hf or checkpoint,
            parallel,
            hugging_face=hf is not None,
            adapter=adapter,
            force=force,
            tokenizer=tokenizer,
            pooling=pooling,
            instructions={"query": query_instruction, "passage": passage_instruction},
            max_tokens=seq_length,
            micro_batch_size=micro_batch_size,
            precision=precision,
        ) as (embedder, _):
            evaluate_retrieval(embedder, retrieval, split, dimensions)
        return

    from flagscale_like.data.conversations import conversations_at
    from flagscale_like.data.stream import read_stream
    from flagscale_like.recipes.evaluate import evaluate_conversations, evaluate_stream
    from flagscale_like.runtime.parallel import parallel_context

    source, own_tokenizer = open_model(hf or checkpoint, hugging_face=hf is not None, adapter=adapter, force=force)
    limit = source.arch.longest_sequence
    seq_length = seq_length or min(source.arch.max_position_embeddings or MAX_DEFAULT_WINDOW, MAX_DEFAULT_WINDOW)
    if limit and seq_length > limit:
        raise ConfigError(
            f"the model takes at most {limit} tokens, --seq-length is {seq_length}: give --seq-length {limit}"
        )
    with parallel_context(parallel) as ctx:
        options = {"seq_length": seq_length, "micro_batch_size": micro_batch_size, "precision": precision}
        if conversations_at(prefix := str(data).removesuffix(".bin").removesuffix(".idx")):
            found = evaluate_conversations(source, prefix, ctx, **options)
        else:
            stream = read_stream(data, tokenizer or own_tokenizer, vocab_size=source.arch.vocab_size)
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
    precision: str,
    out: Path | None,
    **options: int | None,
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
