"""`convert`: converts from and to Hugging Face folders, and quantizes to INT8 or INT4."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from flagscale_like.cli.base import Checkpoint, app, example, open_checkpoint

convert_app = typer.Typer(
    help="Convert from and to Hugging Face.",
    epilog=example("flagscale-like convert export --checkpoint runs/demo --out hf"),
    no_args_is_help=True,
)
app.add_typer(convert_app, name="convert")


@convert_app.command("import", epilog=example("flagscale-like convert import --hf Llama-3.2-1B --out ckpt --workers 4"))
def import_(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder with config.json and safetensors files.")],
    out: Annotated[Path, typer.Option(help="Native checkpoint to write; must not exist.")],
    workers: Annotated[int, typer.Option(help="Number of processes; each writes one file.", min=1)] = 1,
) -> None:
    """Convert a Hugging Face folder to a native checkpoint, one tensor at a time. Any layout loads the checkpoint."""
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
        typer.Option("--as", help="Family to export as; it must compute the same function. Default: the model's."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "stored"],
        typer.Option(help="Data type of the weights; stored: as in the checkpoint."),
    ] = "bf16",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder to copy to the export. Default: the run's tokenizer.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of processes; each writes one file.", min=1)] = 1,
    verify: Annotated[
        bool, typer.Option(help="Compare the logits with the native model's; needs memory for both models.")
    ] = True,
) -> None:
    """Convert a native checkpoint to a Hugging Face folder, and check that transformers computes the same logits."""
    import shutil

    from flagscale_like.checkpoint.hf import export

    reader, found_tokenizer = open_checkpoint(checkpoint)
    plan = export(reader, out, family=as_family, dtype=dtype, tokenizer=tokenizer or found_tokenizer, workers=workers)
    typer.echo(f"wrote {out} from {reader.folder} as {plan.family.name} in {dtype}")
    if not verify:
        typer.echo("not verified: --no-verify was given")
        return

    # Imported here, because a conversion without verification does not need megatron-core.
    from flagscale_like.config import Parallel
    from flagscale_like.engine.hf_check import compare_logits, transformers_ships
    from flagscale_like.errors import ConversionError
    from flagscale_like.runtime.parallel import parallel_context

    with parallel_context(Parallel(), alone=True) as ctx:
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
            f"verified by importing the export again: logits differ by {difference:.1e} of the largest; transformers has no "
            f"model class for {plan.family.model_type}"
        )


@convert_app.command(epilog=example("flagscale-like convert quantize --hf hf --out hf-int4 --bits 4 --group-size 64"))
def quantize(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder to quantize.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Number of weights of a row that share a scale.")] = 128,
    symmetric: Annotated[
        bool, typer.Option(help="Store only a scale for each group; --no-symmetric also stores a zero point.")
    ] = True,
) -> None:
    """Quantize a Hugging Face folder to INT8 or INT4 in the compressed-tensors format, which transformers and vLLM load."""
    from flagscale_like.checkpoint.quantize import Scheme, quantize_folder

    summary = quantize_folder(hf, out, Scheme(bits=bits, group_size=group_size, symmetric=symmetric))
    typer.echo(
        f"wrote {out}: {summary.matrices} matrices in INT{bits}, {summary.bytes_before / 1e6:,.1f} MB -> "
        f"{summary.bytes_after / 1e6:,.1f} MB, relative weight error {summary.relative_error:.2e}"
    )
