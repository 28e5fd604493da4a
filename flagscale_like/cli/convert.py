"""`convert`: converts from and to Hugging Face folders, upcycles to experts, and quantizes to INT8 or INT4."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flagscale_like.cli.base import Checkpoint, Force, app, example, open_model, refuse_unread
from flagscale_like.cli.model_options import MaxTokens, PassageInstruction, PoolingOption, QueryInstruction
from flagscale_like.errors import required

if TYPE_CHECKING:
    from flagscale_like.checkpoint.adapters import AdaptedWeights
    from flagscale_like.checkpoint.hf import ExportPlan, ExportSource
    from flagscale_like.checkpoint.sentence_transformers import Pooling
    from flagscale_like.recipes.embedder import Side

convert_app = typer.Typer(
    help="Convert from and to Hugging Face.",
    epilog=example("flagscale-like convert export --checkpoint runs/demo --out hf"),
    no_args_is_help=True,
)
app.add_typer(convert_app, name="convert")


@convert_app.command("import", epilog=example("flagscale-like convert import --hf Llama-3.2-1B --out ckpt --workers 4"))
def import_(
    out: Annotated[Path, typer.Option(help="Native checkpoint to write; must not exist.")],
    hf: Annotated[Path | None, typer.Option(help="Hugging Face folder with config.json and safetensors files.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Convert this LoRA adapter, in peft's format, for the base in --hf or --checkpoint."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --adapter: the base, if it is a native checkpoint.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of processes; each writes one file.", min=1)] = 1,
) -> None:
    """Convert a Hugging Face folder, or a LoRA adapter, to a native checkpoint. Any layout loads the checkpoint."""
    from flagscale_like.errors import ConfigError

    if (hf is None) == (checkpoint is None) or (checkpoint is not None and adapter is None):
        raise ConfigError("give --hf FOLDER; with --adapter, --hf or --checkpoint for the base")
    began = time.perf_counter()
    if adapter is not None:
        from flagscale_like.checkpoint.adapters import open_weights
        from flagscale_like.checkpoint.peft_folder import import_adapter

        base = required(hf or checkpoint, "--hf or --checkpoint")
        lora = import_adapter(adapter, open_weights(base), out)
        typer.echo(
            f"wrote {out} from {adapter}: adapters of rank {lora.rank} and alpha {lora.alpha:g} for "
            f"{', '.join(lora.targets)}; not verified that {base} is their base: peft records no identity"
        )
        return
    from flagscale_like.checkpoint.hf import import_folder
    from flagscale_like.checkpoint.hf_folder import HfFolder

    folder = HfFolder(required(hf, "--hf"))
    arch = import_folder(folder, out, workers=workers)
    seconds = time.perf_counter() - began
    for note in folder.notes:
        typer.echo(note)
    typer.echo(f"wrote {out} from {hf}: {arch.family}, {arch.parameter_count():,} parameters, {seconds:.1f} s")


@convert_app.command(epilog=example("flagscale-like convert export --checkpoint runs/demo --out hf --as llama"))
def export(  # typer makes an option of every parameter
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    as_family: Annotated[
        str | None,
        typer.Option("--as", help="Family to export as; it must compute the same function. Default: the model's."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "stored"] | None,
        typer.Option(
            help="Data type of the weights; stored: as in the checkpoint. Default: bf16; with --adapter, stored."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder to copy to the export. Default: the run's tokenizer.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of processes; each writes one file.", min=1)] = 1,
    verify: Annotated[
        bool, typer.Option(help="Compare the logits with the native model's; needs memory for both models.")
    ] = True,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA run: add the adapters to their base, and write the whole model.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA run: write the adapters alone, in peft's format.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="Of a LoRA run: where its base is now, if that folder has moved.")
    ] = None,
    sentence_transformers: Annotated[
        bool,
        typer.Option("--sentence-transformers", help="Of an embedding model: also say how vectors are made."),
    ] = False,
    pooling: PoolingOption = None,
    query_instruction: QueryInstruction = None,
    passage_instruction: PassageInstruction = None,
    max_tokens: MaxTokens = None,
    force: Force = False,
) -> None:
    """Convert a native checkpoint to a Hugging Face folder, and check that transformers computes the same logits.

    An embedding model becomes a folder without an output layer, for transformers' AutoModel.
    """
    from flagscale_like.checkpoint.adapters import AdaptedWeights, MergedWeights
    from flagscale_like.checkpoint.hf import export
    from flagscale_like.errors import CheckpointError, ConfigError

    reader, found_tokenizer = open_model(checkpoint, adapter=None, base=base, force=force)
    tokenizer = tokenizer or found_tokenizer
    if merge and adapter:
        raise ConfigError("give either --merge or --adapter")
    adapted = reader if isinstance(reader, AdaptedWeights) else None
    if adapted is not None and not (merge or adapter):
        raise ConfigError(f"{reader.folder}: holds LoRA adapters: give --merge for the whole model, or --adapter")
    if adapted is None and (merge or adapter or base or force):
        raise CheckpointError(
            f"{reader.folder}: holds no LoRA adapters: leave out --merge, --adapter, --base and --force"
        )
    if isinstance(reader, AdaptedWeights):
        reader = MergedWeights(reader)
        if not reader.trained():
            typer.echo(f"warning: every B in {reader.folder} is 0: the adapters were not trained, and change nothing")
    of_texts = {
        "pooling": pooling,
        "query_instruction": query_instruction,
        "passage_instruction": passage_instruction,
        "max_tokens": max_tokens,
    }
    if not sentence_transformers:
        refuse_unread("--sentence-transformers", **of_texts)
    if adapted is not None and adapter:
        if as_family is not None:
            raise ConfigError("--adapter writes for the base's own family: leave out --as")
        refuse_unread("an export of the whole model", sentence_transformers=sentence_transformers)
        _export_adapter(adapted, out, dtype or "stored", tokenizer, verify=verify)
        return
    notes: list[str] = []
    beside = _nothing
    if sentence_transformers:
        given: dict[Side, str | None] = {"query": query_instruction, "passage": passage_instruction}
        beside = _sentence_transformers(reader, notes, pooling=pooling, instructions=given, max_tokens=max_tokens)
    dtype = dtype or "bf16"
    plan = export(reader, out, family=as_family, dtype=dtype, tokenizer=tokenizer, workers=workers, beside=beside)
    for note in notes:
        typer.echo(note)
    merged = f", merged into {adapted.base.folder}" if adapted is not None else ""
    typer.echo(f"wrote {out} from {reader.folder}{merged} as {plan.family.name} in {dtype}")
    if not verify:
        typer.echo("not verified: --no-verify was given")
        return
    verify_export(plan, out, adapted)


def _nothing(folder: Path) -> None:
    """Write no further files."""


def _sentence_transformers(
    reader: ExportSource,
    notes: list[str],
    *,
    pooling: Pooling | None,
    instructions: dict[Side, str | None],
    max_tokens: int | None,
) -> Callable[[Path], None]:
    """What writes the files of `export --sentence-transformers` into a folder, and says in `notes` what they hold."""
    from flagscale_like.checkpoint.format import is_embedder
    from flagscale_like.checkpoint.sentence_transformers import TextSettings, write_text_settings
    from flagscale_like.errors import CheckpointError, ConfigError
    from flagscale_like.recipes.embedder import settings_of, with_options

    if not is_embedder(reader):
        raise CheckpointError(f"{reader.folder}: is no embedding model: leave out --sentence-transformers")
    settings = with_options(settings_of(reader), pooling=pooling, instructions=instructions, max_tokens=max_tokens)
    if settings.pooling is None:
        raise ConfigError(f"{reader.folder}: does not say how it pools: give --pooling last, mean or first")
    pooling = settings.pooling
    limit = min(settings.longest, reader.arch.longest_sequence or settings.longest)
    unknown = [f"--{side}-instruction" for side in ("query", "passage") if side not in settings.instructions]
    prompts = {
        name: settings.instructions.get(side, "") for name, side in (("query", "query"), ("document", "passage"))
    }
    notes.append(
        f"vectors: pooling {settings.pooling}, texts of at most {limit} tokens, prompts {prompts} (from {settings.origin})"
    )
    if unknown:
        notes.append(f"note: nothing is known to go before texts; if something does, give {' and '.join(unknown)}")

    def write(folder: Path) -> None:
        found = write_text_settings(folder, TextSettings(pooling, prompts, limit), size=reader.arch.hidden_size)
        notes.extend([found] if found else [])

    return write


def verify_export(plan: ExportPlan, out: Path, adapted: AdaptedWeights | None) -> None:
    """Compare logits, and say how far they are apart; a folder that fails loses its name."""
    # Imported here, because a conversion without verification does not need megatron-core.
    from flagscale_like.config import Parallel
    from flagscale_like.engine.hf_check import change_by_merging, compare_logits, transformers_ships
    from flagscale_like.runtime.parallel import parallel_context

    with parallel_context(Parallel(), alone=True) as ctx, _set_aside(out):
        difference = compare_logits(plan, out, ctx)
        change = change_by_merging(adapted, plan, out, ctx) if adapted is not None else None
    what = "hidden states" if plan.embedder else "logits"
    if transformers_ships(plan.family.model_type):
        typer.echo(f"verified: transformers' {what} differ from the native model's by {difference:.1e} of the largest")
    else:
        typer.echo(
            f"not verified against other code: transformers has no model class for {plan.family.model_type}. The native "
            f"model computed the logits from {out} and from the checkpoint: they differ by {difference:.1e} of the largest"
        )
    if change is not None:
        typer.echo(f"merging and rounding changed the {what} by {change:.1e} of the largest")


def _export_adapter(adapted: AdaptedWeights, out: Path, dtype: str, tokenizer: Path | None, *, verify: bool) -> None:
    """`export --adapter`."""
    from flagscale_like.checkpoint.hf_folder import HfFolder
    from flagscale_like.checkpoint.peft_folder import export_adapter
    from flagscale_like.runtime.precision import DTYPES

    base = adapted.base
    native = None if isinstance(base, HfFolder) else base.state.get("hugging_face", {}).get("folder")
    name = str(base.folder) if isinstance(base, HfFolder) else native
    dtype = "fp32" if dtype == "stored" else dtype  # adapters are saved as the optimizer's fp32 weights
    export_adapter(adapted.adapters, out, base_name=name, dtype=DTYPES[dtype], tokenizer=tokenizer)
    typer.echo(f"wrote {out} from {adapted.folder} for peft, in {dtype}")
    if name is None:
        typer.echo("adapter_config.json names no base: it is a native checkpoint; export that too, for peft to load it")
    if not verify:
        typer.echo("not verified: --no-verify was given")
        return
    from flagscale_like.config import Parallel
    from flagscale_like.engine.hf_check import compare_adapter
    from flagscale_like.runtime.parallel import parallel_context

    with parallel_context(Parallel(), alone=True) as ctx, _set_aside(out):
        difference, by_peft = compare_adapter(adapted, out, ctx, dtype=DTYPES[dtype])
    if by_peft:
        typer.echo(f"verified: peft's logits differ from the native model's by {difference:.1e} of the largest")
        return
    typer.echo(
        "not verified against other code: peft is not installed, or transformers cannot load the base. The native model "
        f"computed the logits with {out} and with the checkpoint's adapters: they differ by {difference:.1e} of the largest"
    )


@contextmanager
def _set_aside(out: Path) -> Iterator[None]:
    """Take the name of an export that fails its verification."""
    import shutil

    from flagscale_like.errors import ConversionError

    try:
        yield
    except ConversionError:
        failed = out.with_name(out.name + ".failed")
        shutil.rmtree(failed, ignore_errors=True)
        out.rename(failed)
        typer.echo(f"moved to {failed}", err=True)
        raise


@convert_app.command(
    epilog=example("flagscale-like convert upcycle --hf Llama-3.2-1B --out ckpt-experts --experts 8 --top-k 2")
)
def upcycle(  # typer makes an option of every parameter
    out: Annotated[Path, typer.Option(help="Native checkpoint to write; must not exist.")],
    experts: Annotated[int, typer.Option(help="Experts of a layer.", min=2)],
    top_k: Annotated[int, typer.Option(help="Experts that a token goes to.", min=1)],
    hf: Annotated[Path | None, typer.Option(help="The dense model: a Hugging Face folder.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The dense model: a run, its checkpoints folder or one checkpoint.")
    ] = None,
    split: Annotated[
        int,
        typer.Option(help="Cut each copy of the FFN into so many experts, each of that fraction of its width.", min=1),
    ] = 1,
    shared: Annotated[
        bool, typer.Option("--shared", help="Make one more copy a shared FFN, which every token goes through.")
    ] = False,
    noise: Annotated[
        float,
        typer.Option(
            help="Noise on each expert's matrices, in standard deviations of the matrix. 0: same logits.", min=0
        ),
    ] = 0.0,
    dense_layers: Annotated[int, typer.Option(help="Number of first layers that stay dense.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the router and of the noise.", min=0, max=2**63 - 1)] = 0,
    workers: Annotated[int, typer.Option(help="Number of processes; each writes one file.", min=1)] = 1,
) -> None:
    """Make a mixture of experts of a dense model, each expert a copy of its FFN, as a native checkpoint to train from."""
    from flagscale_like.checkpoint.adapters import AdaptedWeights
    from flagscale_like.checkpoint.upcycle import Upcycling, expressed_by, upcycle
    from flagscale_like.errors import CheckpointError, ConfigError

    if (hf is None) == (checkpoint is None):
        raise ConfigError("give either --hf FOLDER or --checkpoint RUN: the dense model")
    folder = required(hf or checkpoint, "--hf or --checkpoint")
    source, _ = open_model(folder, hugging_face=hf is not None, adapter=None)
    if isinstance(source, AdaptedWeights):
        raise CheckpointError(
            f"{source.folder}: holds LoRA adapters: merge them into their base first, with `convert export --merge`"
        )
    options = Upcycling(
        experts=experts,
        top_k=top_k,
        split=split,
        shared=shared,
        noise=noise,
        dense_layers=dense_layers,
        seed=seed,
    )
    arch = upcycle(source, out, options, workers=workers)
    typer.echo(
        f"wrote {out} from {source.folder}: {experts} experts a layer, {top_k} a token, {arch.parameter_count():,} "
        f"parameters, {arch.active_parameter_count():,} a token"
    )
    computes = "its logits are the dense model's" if not noise else f"noise of {noise:g} changes its logits"
    exports = expressed_by(arch)
    how = f"it exports as {exports}" if exports else "no Hugging Face family has such a model: it cannot be exported"
    typer.echo(f"{computes}; {how}")


@convert_app.command(epilog=example("flagscale-like convert quantize --hf hf --out hf-int4 --bits 4 --group-size 64"))
def quantize(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder to quantize.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4 or 8.", min=4, max=8)] = 4,
    group_size: Annotated[int, typer.Option(help="Number of weights of a row that share a scale.", min=1)] = 128,
    symmetric: Annotated[
        bool, typer.Option(help="Store only a scale for each group; --no-symmetric also stores a zero point.")
    ] = True,
) -> None:
    """Quantize a Hugging Face folder to INT8 or INT4 in the compressed-tensors format, which transformers and vLLM load."""
    from flagscale_like.checkpoint.quantize import quantize_folder
    from flagscale_like.families.quantization import Scheme

    summary = quantize_folder(hf, out, Scheme(bits=bits, group_size=group_size, symmetric=symmetric))
    typer.echo(
        f"wrote {out}: {summary.matrices} matrices in INT{bits}, {summary.bytes_before / 1e6:,.1f} MB -> "
        f"{summary.bytes_after / 1e6:,.1f} MB, relative weight error {summary.relative_error:.2e}"
    )
    typer.echo("transformers loads it with compressed-tensors: pip install 'flagscale_like[quantized]'")
