"""`init`: makes a folder with a YAML file and text, ready for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flagscale_like.cli.base import app, example
from flagscale_like.errors import ConfigError

STARTER = """\
# A Llama-shaped model of 1.3 M parameters on the text in data/: about a minute on a CPU.
#   flagscale-like train run.yaml                                      # after a stop or a kill, this command resumes the run
#   flagscale-like train run.yaml parallel.tp=2 parallel.pp=2          # on four processes, with two kinds of parallelism
#   flagscale-like train run.yaml --print-config                       # all keys with their values
#   flagscale-like report runs/first                                   # write an HTML page of the run
run_dir: runs/first

model:
  num_layers: 4
  hidden_size: 128
  num_attention_heads: 4
  num_query_groups: 2        # grouped-query attention
  ffn_hidden_size: 352
  vocab_size: 2048
  max_position_embeddings: 512

train:
  steps: 100
  micro_batch_size: 4
  global_batch_size: 8
  seq_length: 128
  precision: fp32            # bf16 on a GPU
  eval_interval: 50
  eval_steps: 2

optimizer:
  lr: 2.0e-3
  min_lr: 2.0e-4
  warmup_steps: 10

data:
  prepare:                   # the first run tokenizes the input to runs/first/data
    input: [data]            # text: .txt, .md, .jsonl, .parquet, .py; `init` puts some source files of Python there
    tokenizer_vocab_size: 2048
  split: "85,15,0"           # shares of the documents: training, validation, test

checkpoint:
  interval: 50
  keep: 2
"""
SAMPLES = (
    "argparse.py",
    "ast.py",
    "dataclasses.py",
    "difflib.py",
    "inspect.py",
    "pathlib.py",
    "textwrap.py",
    "typing.py",
)


@app.command(epilog=example("flagscale-like init first-run"))
def init(
    folder: Annotated[Path, typer.Argument(help="A new or an empty folder.", metavar="DIR")],
) -> None:
    """Make a folder with a YAML file and some text, ready for training."""
    import shutil
    import sysconfig

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not empty: give a new folder")
    stdlib = Path(sysconfig.get_path("stdlib"))
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(STARTER, encoding="utf-8")
        for name in SAMPLES:
            shutil.copyfile(stdlib / name, folder / "data" / name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    typer.echo(f"made {folder}/run.yaml and {folder}/data ({len(SAMPLES)} modules of Python's own source)")
    typer.echo(f"next: cd {folder} && flagscale-like train run.yaml")
