"""Options of the commands that run a model, and of those that run an embedding model. One text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelCheckpoint = Annotated[Path | None, typer.Option(help="Native checkpoint: a run, or one step_* folder.")]
HuggingFaceFolder = Annotated[Path | None, typer.Option(help="Hugging Face folder, instead of --checkpoint.")]
HuggingFace = Annotated[
    Path | None, typer.Option(help="Hugging Face or sentence-transformers folder, instead of --checkpoint.")
]
ModelTokenizer = Annotated[Path | None, typer.Option(help="Tokenizer folder. Default: the model's tokenizer.")]
PoolingOption = Annotated[
    Literal["last", "mean", "first"] | None,
    typer.Option(help="Hidden states that make a vector. Default: what the run or the folder says."),
]
QueryInstruction = Annotated[
    str | None, typer.Option(help="Put before each query. Default: what the run or the folder says.")
]
PassageInstruction = Annotated[str | None, typer.Option(help="The same before each passage.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most tokens of a text; the rest is cut. Default: what the model was trained with, or 512."
    ),
]
Dimensions = Annotated[
    int | None, typer.Option(min=1, help="Keep so many numbers of each vector. Default: the hidden size.")
]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Data type of weights and activations.")]
MicroBatchSize = Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)]
TensorParallel = Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)]
PipelineParallel = Annotated[int, typer.Option(help="Pipeline stages.", min=1)]
RanksToStart = Annotated[
    int | None, typer.Option(help="Ranks to start. Default: one for each GPU; on a CPU, tp*pp.", min=1)
]
