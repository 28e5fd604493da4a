"""`convert`: from and to Hugging Face, and INT8 / INT4."""

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

    reader, found_tokenizer = open_checkpoint(checkpoint)
    plan = export(reader, out, family=as_family, dtype=dtype, tokenizer=tokenizer or found_tokenizer, workers=workers)
    typer.echo(f"wrote {out} from {reader.folder} as {plan.family.name} in {dtype}")
    if not verify:
        typer.echo("not verified: --no-verify was given")
        return

    # Only now: a conversion by itself needs none of megatron-core.
    from flagscale_like.config import Parallel
    from flagscale_like.engine.hf_check import compare_logits, transformers_ships
    from flagscale_like.errors import ConversionError
    from flagscale_like.runtime.parallel import parallel_context

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
