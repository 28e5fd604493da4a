"""The command line inside a process that has torch and megatron-core loaded: no command pays for their import."""

import contextlib
import multiprocessing
import os
import subprocess
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from typer.testing import CliRunner

from flagscale_like.cli import app
from flagscale_like.errors import UserError
from tests.harness import REPOSITORY, run_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@dataclass(frozen=True)
class Outcome:
    """What a command did. `error` is the line that a user reads on stderr; a traceback, where it is no UserError."""

    exit_code: int
    printed: str
    error: str = ""


def invoke(words: list[str]) -> Outcome:
    """`flagscale-like WORDS` in this process and folder. Only what starts no process group: `run_commands` has ranks."""
    result = CliRunner().invoke(app, words, prog_name="flagscale-like")
    error = result.exception
    if isinstance(error, UserError):
        return Outcome(error.exit_code, result.output, f"error: {error}")
    if error is not None and not isinstance(error, SystemExit):
        return Outcome(1, result.output, "".join(traceback.format_exception(error)))
    return Outcome(result.exit_code, result.output)


def command(*words: str, apart: bool = False) -> subprocess.CompletedProcess:
    """What `harness.cli(*words)` gives, without its imports: for a test that is about what a command does.

    Args:
        apart: in a process forked from the warm server, for a command that starts a process group or workers, or changes its
            process. Without it the command runs in this process.
    """
    found = run_commands([list(words)])[0][0] if apart else invoke(list(words))
    return subprocess.CompletedProcess(words, found.exit_code, found.printed, found.error and f"{found.error}\n")


def run_commands(
    lines: list[list[str]], folder: Path | str = REPOSITORY, *, ranks: int = 1, **environment: str
) -> list[list[Outcome]]:
    """Run commands one after the other in `folder`, in new processes that fork from the warm server.

    One rank is a user's shell, without a launcher; several are torchrun's. `environment` has variables for them. Returns, for
    each rank, an outcome a command.
    """
    return run_ranks(ranks, _run_here, lines, str(folder), environment)


def _run_here(lines: list[list[str]], folder: str, environment: dict[str, str]) -> list[Outcome]:
    from megatron.core import parallel_state  # not before flagscale_like, which prepares for it

    warnings.simplefilter("ignore")
    os.environ.update(environment)
    # The harness's ranks are daemons that start others by a fork server. Here some commands start workers, as a shell's do.
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method(None, force=True)
    if os.environ.get("WORLD_SIZE") == "1":
        for name in LAUNCHER:
            os.environ.pop(name, None)
    found = []
    with contextlib.chdir(folder):
        for words in lines:
            found.append(invoke(words))
            if dist.is_initialized():  # an error leaves it to the end of the process, which is not here
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
    return found
