"""The command line. Each command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flagscale_like.errors import ConfigError, PeerLostError, PlatformError, UserError

if TYPE_CHECKING:
    from flagscale_like.config import RunConfig
    from flagscale_like.runtime.parallel import ParallelContext

app = typer.Typer(
    name="flagscale-like",
    help="3D-parallel pretraining of language models, from a laptop CPU to a GPU cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(help="Convert from and to Hugging Face.", no_args_is_help=True)
ckpt_app = typer.Typer(help="Look at checkpoints.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
app.add_typer(ckpt_app, name="ckpt")

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="X.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: train.steps=100", metavar="[KEY=VALUE]...")
]
Checkpoint = Annotated[Path, typer.Option(help="A run folder, a checkpoints/ folder, or one step_* folder.")]


def example(text: str) -> str:
    """The last line of a command's help."""
    return f"Example: {text}"


@app.command(epilog=example("flagscale-like train examples/aquila2/tiny.yaml train.steps=50 parallel.pp=2"))
def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Ranks to start here; one a GPU, or tp*pp*cp on CPU.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Restarts of all ranks after one fails; they resume by themselves.")
    ] = 0,
    print_config: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, and stop.")] = False,
    world_size: Annotated[int | None, typer.Option(help="Ranks to check the layout for, with --dry-run.")] = None,
    cluster: Annotated[str | None, typer.Option(help="What to plan time and memory for, with --dry-run.")] = None,
) -> None:
    """Train, or go on with, the run that a YAML file describes; under torchrun, or starting the ranks itself."""
    from flagscale_like.config import load_config
    from flagscale_like.runtime.launch import default_processes, is_worker, launch

    config = load_config(config_file, overrides or (), _model_of_source)
    if print_config:
        typer.echo(config.to_yaml(), nl=False)
        return
    if is_worker():
        _train_here(config)
        return
    if nproc_per_node is not None and nproc_per_node < 1:
        raise ConfigError(f"--nproc-per-node ({nproc_per_node}) must be 1 or more")
    processes = nproc_per_node or default_processes(config.parallel.model_parallel_size)
    ranks = (world_size if dry_run else None) or processes
    dp = config.data_parallel_size(ranks)
    if dry_run:
        _describe(config, ranks, dp, cluster, local=ranks == processes)
        return
    if processes == 1 and max_restarts == 0:
        _train_here(config)
        return
    arguments = ["train", str(config_file), *(overrides or ())]
    raise SystemExit(launch(processes, arguments, max_restarts=max_restarts))


def _model_of_source(values: dict) -> dict | None:
    """`model` of a YAML that leaves it out: that of the checkpoint or Hugging Face folder that training starts from."""
    options = values.get("checkpoint")
    if not isinstance(options, dict):
        return None
    if isinstance(options.get("init_from_hf"), str):
        from flagscale_like.families import read_config

        return read_config(Path(options["init_from_hf"]))[1].model_dump(mode="json")
    if isinstance(options.get("load"), str):
        from flagscale_like.checkpoint.format import CheckpointReader
        from flagscale_like.checkpoint.manifest import find_checkpoint

        return CheckpointReader(find_checkpoint(Path(options["load"]))).arch.model_dump(mode="json")
    return None


def _train_here(config: RunConfig) -> None:
    from flagscale_like.data.pretrain import prepare_once
    from flagscale_like.runtime.parallel import parallel_context, world_size_from_env
    from flagscale_like.training.loop import agree, train

    config.data_parallel_size(world_size_from_env())
    with parallel_context(config.parallel, seed=config.train.seed) as ctx:
        _make_run_folder(config, ctx)
        # Rank 0 makes the files; a failure there is every rank's error.
        agree(ctx, lambda: prepare_once(config, workers=os.cpu_count() or 1) if ctx.is_main else None)
        train(prepare_once(config), ctx)


def _make_run_folder(config: RunConfig, ctx: ParallelContext) -> None:
    try:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {config.run_dir}: cannot be made: {error.strerror}") from None
    ctx.barrier()


def _describe(config: RunConfig, ranks: int, dp: int, cluster_text: str | None, *, local: bool) -> None:
    """The plan of the configured layout; times where the cluster is given, or the ranks are this machine's."""
    from flagscale_like.planner.report import describe_memory, describe_time
    from flagscale_like.planner.search import Goal, configured_layout, evaluate

    par, train, model = config.parallel, config.train, config.model
    cluster, eff = _cluster(cluster_text, config, ranks) if cluster_text or local else (None, None)
    cuda = eff is None  # a measured CPU has efficiencies of its own
    goal = Goal.of(config)
    layout = configured_layout(config, ranks, goal, cluster.device if cluster and cuda else None)
    tokens = train.total_samples() * train.seq_length
    padded = model.parameter_count(model.padded_vocab_size(par.tp))
    typer.echo(f"model        {model.parameter_count():,} parameters ({padded:,} with the padded vocabulary)")
    typer.echo(
        f"layout       {ranks} ranks = tp {par.tp} x pp {par.pp} x cp {par.cp} x dp {dp}; vpp {par.vpp}, sp {par.sp}"
    )
    typer.echo(
        f"batch        {train.global_batch_size} sequences of {train.seq_length} = "
        f"{layout.num_microbatches} micro-batches of {train.micro_batch_size} a rank; bubble {layout.bubble:.1%}"
    )
    typer.echo(f"run          {train.steps:,} steps, {tokens:,} tokens, {train.precision}")
    if config.data.sources:
        from flagscale_like.data.pretrain import check_sources

        check_sources(config)
        typer.echo(f"data         {len(config.data.sources)} sources found")
    plan = evaluate(goal, layout, cluster or _nominal(ranks), eff, overhead=cuda)
    typer.echo(f"memory       planned peak of a rank of each stage\n{describe_memory(plan.memory)}")
    if cluster is None:
        typer.echo("time         give --cluster, 64x8xH100 say, for the expected tokens/s")
    else:
        typer.echo(f"time         on {cluster.describe()}: {describe_time(plan)}")
        if plan.peak_bytes > cluster.device.hbm_bytes:
            raise ConfigError(
                f"a rank needs {plan.peak_bytes / 2**30:.1f} GiB, {cluster.device.name} has "
                f"{cluster.device.hbm_bytes / 2**30:.1f}: `flagscale-like plan` finds a layout that fits"
            )
    typer.echo("the configuration is valid")


def _nominal(ranks: int):  # noqa: ANN202  (ClusterSpec, whose import is late)
    """A cluster for plans whose time is not shown."""
    from flagscale_like.cluster import parse_cluster

    return parse_cluster(f"{ranks}xH100")


def _cluster(text: str | None, config: RunConfig, ranks: int):  # noqa: ANN202
    """The cluster a user named, or this machine, measured; and its efficiencies where it is a measured CPU."""
    from dataclasses import replace

    from flagscale_like.cluster import ClusterSpec, parse_cluster
    from flagscale_like.planner.throughput import MEASURED
    from flagscale_like.runtime.platform import get_platform
    from flagscale_like.runtime.roofline import measure_device

    if text is not None and not text.lower().endswith("xthis"):
        return parse_cluster(text), None
    platform = get_platform()
    count = parse_cluster(text.lower().replace("xthis", "xH100")).devices if text else ranks
    device = measure_device(platform, config.train.precision, processes=1 if platform.is_cuda else count)
    cluster = ClusterSpec(nodes=1, devices_per_node=count, device=device, network_gb_per_s=device.link_gb_per_s)
    if text:
        cluster = replace(parse_cluster(text, this_device=device), network_gb_per_s=device.link_gb_per_s)
    return cluster, None if platform.is_cuda else MEASURED


@app.command(epilog=example("flagscale-like plan examples/aquila2/34b.yaml --cluster 64x8xA100-40 --write best.yaml"))
def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str, typer.Option(help="NODESxDEVICESxNAME, 64x8xH100 say; NAME `this` is the machine at hand, measured.")
    ] = "1x8xH100",
    network_gb_per_s: Annotated[float | None, typer.Option(help="A device's share of the network, one way.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts to list.")] = 10,
    max_vpp: Annotated[int | None, typer.Option(min=1, help="Most model chunks a stage; 1: no interleaving.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Try activation offload where a layout is too big.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Write the YAML of the best layout here.")] = None,
) -> None:
    """Rank the layouts of a model on a cluster by tokens a second, and say why the others lost."""
    from dataclasses import replace

    from flagscale_like.config import load_config
    from flagscale_like.planner.report import describe_memory, describe_ranking, describe_time, updated_config
    from flagscale_like.planner.search import Goal, rank_layouts

    config = load_config(config_file, overrides or (), _model_of_source)
    place, eff = _cluster(cluster, config, 1)
    if network_gb_per_s is not None:
        if network_gb_per_s <= 0:
            raise ConfigError(f"--network-gb-per-s ({network_gb_per_s}) must be above 0")
        place = replace(place, network_gb_per_s=network_gb_per_s)
    goal = Goal.of(config)
    ranking = rank_layouts(goal, place, offload=offload, max_vpp=max_vpp, eff=eff)
    best = ranking.plans[0]
    typer.echo(describe_ranking(ranking, place, top=top))
    typer.echo(f"\nthe first: {best.layout.describe()}: {describe_time(best)}\n{describe_memory(best.memory)}")
    if write is not None:
        try:
            write.write_text(updated_config(config, best.layout).to_yaml(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--write {write}: cannot be written: {error.strerror}") from None
        typer.echo(f"wrote {write}")


@app.command(epilog=example("flagscale-like bench examples/aquila2/tiny.yaml --sweep train.micro_batch_size=1,2,4"))
def bench(
    config_file: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them that are left out.")] = 3,
    sweep: Annotated[list[str] | None, typer.Option(help="KEY=VALUE,VALUE; several make every combination.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run transformers on the same shape; one process.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Save a checkpoint after the last step; report the stall.")
    ] = False,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks; one a GPU, or as many as the layout.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench"),
    result: Annotated[Path | None, typer.Option(hidden=True, help="Where a rank writes its point.")] = None,
) -> None:
    """Time the training loop on synthetic tokens: tokens/s, TFLOP/s, MFU, memory, next to what is planned."""
    import json
    import tempfile

    from flagscale_like.config import load_config
    from flagscale_like.runtime.launch import default_processes, is_worker, launch

    if is_worker():
        _bench_here(load_config(config_file, overrides or (), _model_of_source), steps, warmup, compare, save, result)
        return
    from flagscale_like.planner.report import table
    from flagscale_like.training.benchmark import plot, rows, sweep_points

    found = []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}") from None
    for point in sweep_points(sweep or ()):
        name = " ".join(point)
        changed = [*(overrides or ()), *point]
        try:
            config = load_config(config_file, changed, _model_of_source)
            processes = nproc_per_node or default_processes(config.parallel.model_parallel_size)
            config.data_parallel_size(processes)
            if compare and processes > 1:
                raise ConfigError(f"--compare runs in one process, this layout has {processes}")
        except ConfigError as error:
            if not point:
                raise
            found.append({"point": name, "error": str(error)})
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "point.json"
            options = ["--steps", str(steps), "--warmup", str(warmup), "--result", str(file)]
            options += ["--compare"] * compare + ["--save"] * save
            code = launch(processes, ["bench", str(config_file), *changed, *options])
            if not file.is_file():
                if not point:
                    raise SystemExit(code or 1)
                found.append({"point": name, "error": f"failed with exit code {code}"})
                continue
            found.append({"point": name, **json.loads(file.read_text(encoding="utf-8"))})
    (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    typer.echo(table(rows(found), right=(2, 4, 5, 6, 7, 8, 9, 10)))
    good = [entry["measured"] for entry in found if "measured" in entry]
    if good:
        first = good[0]
        typer.echo(
            f"{first['devices']} x {first['device']}, {first['precision']}; MFU = model FLOPs / (step time x devices x "
            f"{first['peak_flops'] / 1e12:.4g} TFLOP/s); peak: {first['peak_source']}; model FLOPs without recompute"
        )
        plot(found, out / "bench.png")
    for entry in found:
        if "compared" in entry:
            c = entry["compared"]
            typer.echo(
                f"{entry['point'] or 'as configured'}: a step of ours {c['ours_s']:.4g} s, of transformers "
                f"{c['theirs_s']:.4g} s, in turn: ours / transformers in tokens/s {c['ratio']:.2f} "
                f"(median of {c['rounds']} pairs; {c['note']})"
            )
    typer.echo(f"wrote {out / 'bench.json'}" + (f" and {out / 'bench.png'}" if good else ""))


def _bench_here(config: RunConfig, steps: int, warmup: int, compare: bool, save: bool, result: Path | None) -> None:
    """One point, on this rank; rank 0 writes it to `result`."""
    import contextlib
    import json
    from dataclasses import asdict

    from flagscale_like.runtime.parallel import parallel_context
    from flagscale_like.training.benchmark import compare_with_transformers, measure

    with parallel_context(config.parallel, seed=config.train.seed) as ctx:
        with contextlib.redirect_stdout(sys.stderr):
            point = measure(config, ctx, steps=steps, warmup=warmup, checkpoint=save)
            compared = compare_with_transformers(config, ctx, rounds=steps, warmup=warmup) if compare else None
        if ctx.is_main and result is not None:
            found = {"measured": asdict(point)} | ({"compared": asdict(compared)} if compared else {})
            result.write_text(json.dumps(found), encoding="utf-8")


@app.command(epilog=example("flagscale-like preprocess corpus/*.jsonl --tokenizer tok/ --out data/corpus --workers 8"))
def preprocess(
    inputs: Annotated[
        list[str], typer.Argument(help="jsonl, text or parquet: files, folders, globs, or python-stdlib.")
    ],
    out: Annotated[Path, typer.Option(help="Prefix of the .bin, .idx and .documents.parquet to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder.")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(help="Train a byte-level BPE of this size.")] = None,
    key: Annotated[str, typer.Option(help="jsonl field or parquet column with the text.")] = "text",
    unit: Annotated[
        Literal["file", "line", "paragraph"], typer.Option(help="A document of a plain text file.")
    ] = "file",
    workers: Annotated[int, typer.Option(help="Processes that tokenize.")] = 1,
) -> None:
    """Tokenize text into the .bin/.idx that training reads, with a table from each document to its source line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from flagscale_like.data.preprocess import find_inputs, preprocess, read_documents
    from flagscale_like.data.tokenizer import train_bpe

    files = find_inputs(inputs)
    if (tokenizer is None) == (train_tokenizer is None):
        raise ConfigError("give --tokenizer FOLDER, or --train-tokenizer SIZE to make one")
    if workers < 1:
        raise ConfigError(f"--workers ({workers}) must be 1 or more")
    if tokenizer is None:
        tokenizer = Path(f"{out}-tokenizer")
        train_bpe((d.text for d in read_documents(files, key=key, unit=unit)), train_tokenizer, tokenizer)
    began = time.perf_counter()
    console = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=sum(f.stat().st_size for f in files))
        summary = preprocess(
            files, tokenizer, out, key=key, unit=unit, workers=workers, progress=lambda n: bar.advance(task, n)
        )
    seconds = time.perf_counter() - began
    typer.echo(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens ({summary.tokens / seconds:,.0f} tokens/s), "
        f"{summary.empty:,} empty ones left out -> {out}.bin, .idx, .documents.parquet"
    )


@convert_app.command("import", epilog=example("flagscale-like convert import --hf Llama-3.2-1B --out ckpt --workers 4"))
def import_(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder: config.json and safetensors.")],
    out: Annotated[Path, typer.Option(help="Native checkpoint to write; must not exist.")],
    workers: Annotated[int, typer.Option(help="Processes that write, a file each.", min=1)] = 1,
) -> None:
    """Write a native checkpoint from a Hugging Face folder, tensor by tensor; it loads on any layout."""
    from flagscale_like.checkpoint.hf import import_folder

    began = time.perf_counter()
    arch = import_folder(hf, out, workers=workers)
    seconds = time.perf_counter() - began
    typer.echo(f"wrote {out} from {hf}: {arch.family}, {arch.parameter_count():,} parameters, {seconds:.1f} s")


@convert_app.command(epilog=example("flagscale-like convert export --checkpoint runs/demo --out hf --as llama"))
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    as_family: Annotated[
        str | None,
        typer.Option("--as", help="Family to write it as, where the maths is the same; its own, if left out."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "stored"], typer.Option(help="Of the weights; stored: as in the checkpoint.")
    ] = "bf16",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder to put beside; the run's, if left out.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that write, a file each.", min=1)] = 1,
    verify: Annotated[bool, typer.Option(help="Compare logits with the native model; needs memory for both.")] = True,
) -> None:
    """Write a Hugging Face folder from a native checkpoint, and check that transformers computes the same logits."""
    import shutil

    from flagscale_like.checkpoint.hf import export
    from flagscale_like.checkpoint.hf_check import compare_logits, transformers_ships
    from flagscale_like.config import Parallel
    from flagscale_like.errors import ConversionError
    from flagscale_like.runtime.parallel import parallel_context

    reader, found_tokenizer = _open(checkpoint)
    plan = export(reader, out, family=as_family, dtype=dtype, tokenizer=tokenizer or found_tokenizer, workers=workers)
    typer.echo(f"wrote {out} from {reader.folder} as {plan.family.name} in {dtype}")
    if not verify:
        typer.echo("not verified: --no-verify was given")
        return
    with parallel_context(Parallel()) as ctx:
        try:
            difference = compare_logits(reader, plan, out, ctx)
        except ConversionError:
            failed = out.with_name(out.name + ".failed")
            shutil.rmtree(failed, ignore_errors=True)
            out.rename(failed)
            typer.echo(f"moved to {failed}", err=True)
            raise
    if transformers_ships(plan.family.model_type):
        typer.echo(f"verified: transformers' logits differ from the native model's by {difference:.1e} of the largest")
    else:
        typer.echo(
            f"verified by reading it back: logits differ by {difference:.1e} of the largest; transformers has no "
            f"{plan.family.model_type} of its own"
        )


@convert_app.command(epilog=example("flagscale-like convert quantize --hf hf --out hf-int4 --bits 4 --group-size 64"))
def quantize(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder to quantize.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights of a row that share a scale.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="A scale a group; else a zero point too.")] = True,
) -> None:
    """Write INT8 or INT4 weights in the compressed-tensors format, which transformers and vLLM load."""
    from flagscale_like.checkpoint.quantize import Scheme, quantize_folder

    summary = quantize_folder(hf, out, Scheme(bits=bits, group_size=group_size, symmetric=symmetric))
    typer.echo(
        f"wrote {out}: {summary.matrices} matrices in INT{bits}, {summary.bytes_before / 1e6:,.1f} MB -> "
        f"{summary.bytes_after / 1e6:,.1f} MB, relative weight error {summary.relative_error:.2e}"
    )


@app.command(epilog=example("flagscale-like evaluate --hf SmolLM2-135M --data heldout.txt --pp 2"))
def evaluate(
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
    from flagscale_like.runtime.parallel import parallel_context
    from flagscale_like.training.evaluation import evaluate_stream

    source, own_tokenizer = (HfFolder(hf), hf) if hf is not None else _open(checkpoint)
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
    from flagscale_like.checkpoint.store import load_model
    from flagscale_like.config import Parallel
    from flagscale_like.data.tokenizer import Tokenizer
    from flagscale_like.model.generate import generate
    from flagscale_like.runtime.parallel import parallel_context

    reader, found_tokenizer = _open(checkpoint)
    folder = tokenizer or found_tokenizer
    if folder is None:
        raise ConfigError("the run names no tokenizer: give --tokenizer FOLDER")
    words = Tokenizer(folder)
    ids = words.encode_batch([prompt])[0] or [words.eod]
    with parallel_context(Parallel()) as ctx:
        model = load_model(reader, ctx, precision="fp32")
        new = generate(
            model, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=words.eod, seed=seed
        )
    typer.echo(prompt + words.decode(new))


def _open(checkpoint: Path):  # noqa: ANN202  (CheckpointReader, whose import is late)
    """The newest checkpoint at a path, and the tokenizer folder that its run used, or that was imported with it."""
    from flagscale_like.checkpoint.format import CheckpointReader
    from flagscale_like.checkpoint.manifest import find_checkpoint

    reader = CheckpointReader(find_checkpoint(checkpoint))
    tokenizer = reader.state.get("config", {}).get("data", {}).get("tokenizer") or reader.folder / "tokenizer"
    return reader, Path(tokenizer) if Path(tokenizer).is_dir() else None


Processes = Annotated[int | None, typer.Option(help="Processes that read; as many as CPUs, if left out.")]


def _checkpoints_root(run: Path) -> Path:
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


@ckpt_app.command("list", epilog=example("flagscale-like ckpt list runs/demo"))
def ckpt_list(run: Annotated[Path, typer.Argument(help="A run folder or its checkpoints/ folder.")]) -> None:
    """List a run's checkpoints, newest first; reads manifests, not the data."""
    from rich.console import Console
    from rich.table import Table

    from flagscale_like.checkpoint.manifest import TEMPORARY, read_latest, read_manifest, read_state, step_folders
    from flagscale_like.errors import CheckpointError

    root = _checkpoints_root(run)
    latest = read_latest(root)
    table = Table("step", "layout", "MB", "consumed samples", "folder", box=None)
    for folder in step_folders(root):
        try:
            size = sum(record.size_bytes for record in read_manifest(folder)) / 1e6
            state = read_state(folder)
            layout = " ".join(f"{name}{degree}" for name, degree in state.get("layout", {}).items())
            where = f"{folder}{' (latest)' if folder == latest else ''}"
            table.add_row(str(state.get("step")), layout, f"{size:,.1f}", str(state.get("consumed_samples")), where)
        except CheckpointError as error:
            table.add_row(folder.name.removeprefix("step_"), "damaged", "", "", str(error))
    for folder in sorted(root.glob(f"{TEMPORARY}*")):
        table.add_row("", "unfinished", "", "", str(folder))
    if not table.row_count:
        raise CheckpointError(f"{root}: holds no checkpoints")
    console = Console()
    Console(width=console.width if console.is_terminal else 1000).print(table)


@ckpt_app.command("verify", epilog=example("flagscale-like ckpt verify runs/demo"))
def ckpt_verify(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoints/ or a step_* folder.")],
    processes: Processes = None,
) -> None:
    """Compare every file of a checkpoint with its size and checksum in the manifest; the newest one of a run."""
    from flagscale_like.checkpoint.manifest import find_checkpoint, read_manifest, verify_files
    from flagscale_like.errors import CheckpointError

    folder = find_checkpoint(checkpoint)
    began = time.perf_counter()
    problems = verify_files(folder, processes=processes or os.cpu_count() or 1)
    seconds, records = time.perf_counter() - began, read_manifest(folder)
    if problems:
        raise CheckpointError(f"{folder}: {len(problems)} of {len(records)} files are damaged: {'; '.join(problems)}")
    size = sum(record.size_bytes for record in records)
    typer.echo(f"{folder}: {len(records)} files are whole ({size / 1e6:,.1f} MB, {size / 1e9 / seconds:.2f} GB/s)")


@ckpt_app.command("show", epilog=example("flagscale-like ckpt show runs/demo --tensors"))
def ckpt_show(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoints/ or a step_* folder.")],
    tensors: Annotated[bool, typer.Option(help="Also list every tensor and its shape.")] = False,
) -> None:
    """Say what a checkpoint holds: step, model, layout, versions, files, tensors."""
    import yaml

    from flagscale_like.checkpoint.format import CheckpointReader
    from flagscale_like.checkpoint.manifest import find_checkpoint, read_manifest

    folder = find_checkpoint(checkpoint)
    reader = CheckpointReader(folder)
    held = [kind for kind in ("param", "exp_avg", "exp_avg_sq") if reader.has(kind)]
    shown = {key: value for key, value in reader.state.items() if key != "config"}
    files = {record.name: record.size_bytes for record in read_manifest(folder)}
    summary = {"folder": str(folder), **shown, "holds": held, "tensors": len(reader.keys()), "file_bytes": files}
    typer.echo(yaml.safe_dump(summary, sort_keys=False), nl=False)
    if tensors:
        for key, shape in reader.shapes().items():
            typer.echo(f"{key} {list(shape)} {reader.dtype(key, 'param')}")


@ckpt_app.command("reshard", epilog=example("flagscale-like ckpt reshard runs/demo --out moved/demo --files 4"))
def ckpt_reshard(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoints/ or a step_* folder.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; must not exist.")],
    files: Annotated[int, typer.Option(min=1, help="Files to write, of equal size.")] = 1,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer's moments out.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Also record each file's sha256.")] = False,
    processes: Processes = None,
) -> None:
    """Write a checkpoint anew in another number of files. Not needed to load it on another layout: any layout loads it."""
    from flagscale_like.checkpoint.manifest import find_checkpoint
    from flagscale_like.checkpoint.reshard import reshard

    folder = find_checkpoint(checkpoint)
    records = reshard(
        folder, out, files=files, weights_only=weights_only, sha256=sha256, processes=processes or os.cpu_count() or 1
    )
    typer.echo(f"wrote {out} from {folder}: {len(records)} files, {sum(r.size_bytes for r in records) / 1e6:,.1f} MB")


@ckpt_app.command("prune", epilog=example("flagscale-like ckpt prune runs/demo --keep 2 --keep-every 1000"))
def ckpt_prune(
    run: Annotated[Path, typer.Argument(help="A run folder or its checkpoints/ folder; no training may write to it.")],
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints to keep.")],
    keep_every: Annotated[int, typer.Option(min=0, help="Also keep multiples of so many steps; 0 for none.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Say what would go, and remove nothing.")] = False,
    processes: Processes = None,
) -> None:
    """Remove old checkpoints and what interrupted saves left. The newest one whose files are whole always stays."""
    from flagscale_like.checkpoint.manifest import newest_whole, remove, remove_leftovers, to_remove
    from flagscale_like.errors import CheckpointError

    root = _checkpoints_root(run)
    good, rejected = newest_whole(root, processes=processes or os.cpu_count() or 1)
    for reason in rejected:
        typer.echo(f"damaged: {reason}")
    if good is None:
        raise CheckpointError(f"{root}: holds no whole checkpoint; nothing was removed")
    gone = to_remove(root, keep=keep, keep_every=keep_every, good=good)
    if not dry_run:
        remove(gone)
        remove_leftovers(root)
    for folder in gone:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {folder}")
    typer.echo(f"{len(gone)} checkpoints {'would go' if dry_run else 'removed'}; {good} is whole")


@app.command(epilog=example("flagscale-like doctor"))
def doctor() -> None:
    """Say what is installed, and what each missing piece costs."""
    from rich.console import Console
    from rich.table import Table

    from flagscale_like.runtime.doctor import examine

    findings = examine()
    table = Table("", "", "", box=None, show_header=False)
    for finding in findings:
        table.add_row(finding.name, finding.status, finding.detail)
    Console(soft_wrap=True, highlight=False).print(table)
    broken = [f.name for f in findings if f.status == "broken"]
    if broken:
        raise PlatformError(f"missing and required: {', '.join(broken)}")
    typer.echo("training works here")


def main() -> None:
    """Run the command line. A UserError is one line on stderr and its own exit code; anything else is a traceback."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        app()
    except UserError as error:
        if rank or isinstance(error, PeerLostError):
            # Rank 0 usually has the same error, and a lost rank its own: let it speak alone. torchrun then ends this one.
            time.sleep(2.0)
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not sys.exit: process groups would wait at exit for ranks that are inside a collective.
        os._exit(error.exit_code)
