"""Run functions on several gloo ranks, and the command line as a user does."""

import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch.distributed import TCPStore

from flagscale_like.config import RunConfig
from flagscale_like.data.pretrain import build_datasets, micro_batches
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import PeerLostError
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.reduction import NamedSum

REPOSITORY = Path(__file__).parents[1]
AFTER_A_FAILURE_S = 5  # what the other ranks get to end once one has failed

# Ranks fork from a server that has torch and megatron-core loaded, and neither threads nor process groups.
_context = multiprocessing.get_context("forkserver")
# torch loads torch._dynamo with the first optimizer that is made, and rank 0 loads matplotlib to draw the losses.
LOADED = ["flagscale_like.recipes.pretrain", "torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.pyplot"]
# Packages of which the server loads what the collected tests have imported: a rank that imports a test's module imports
# them too, and transformers alone takes up to two seconds.
SHARED = {"flagscale_like", "flagscale_kernels", "peft", "pytest", "pytrec_eval", "tokenizers", "transformers", "typer"}


def start_server() -> None:
    """Start the server, which loads modules while the first tests run."""
    _context.set_forkserver_preload([*LOADED, *_shared(), "tests.frozen"])
    multiprocessing.forkserver.ensure_running()


def _shared() -> list[str]:
    # These load pyarrow, whose memory pool starts a thread: whoever forks must have none.
    threaded = ("transformers.trainer", "flagscale_like.recipes.tasks")
    used = [name for name in sys.modules if name.partition(".")[0] in SHARED]
    return [name for name in used if not name.startswith(threaded)]


def tiny_config(run_dir: Path | str, **changes: Any) -> RunConfig:
    """A small synthetic run. Changes are dotted with double underscores: parallel__tp=2."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 96,
            "vocab_size": 250,
        },
        "parallel": {},
        "train": {
            "steps": 6,
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "seq_length": 32,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-2, "warmup_steps": 1},
        "data": {"synthetic": True},
        "checkpoint": {"interval": 3, "keep": 9},
    }
    for name, value in changes.items():
        *groups, leaf = name.split("__")
        here = values
        for group in groups:
            here = here.setdefault(group, {})
        here[leaf] = value
    return RunConfig.model_validate(values)


def write_yaml(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return path


def train_steps(engine: Engine, config: RunConfig, count: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first `count` steps of a run, without anything beside them."""
    ctx, objective, train = engine.ctx, NextToken(), config.train
    data, _ = build_datasets(config, ctx, train_samples=count * train.global_batch_size, valid_samples=0)
    batches, found = micro_batches(data, config, ctx), []
    for _ in range(count):
        micro = train.global_batch_size // (train.micro_batch_size * ctx.dp)
        outputs = engine.forward_backward(batches, objective, micro)
        sums = NamedSum(ctx)({"grad-square": outputs.grad_square, **outputs.sums})
        norm = math.sqrt(sums["grad-square"])
        engine.update(clip=config.optimizer.clip_grad, grad_norm=norm)
        found.append((sums["total"] / sums["count"], norm))
    return found


def build_engine(config: RunConfig, ctx: ParallelContext) -> Engine:
    """A run's model and optimizer, with new weights."""
    return Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(ranks: int, function: Callable, *arguments: Any, timeout_s: float = 180) -> list[Any]:
    """`function(*arguments)` on `ranks` processes with torchrun's environment; its results, by rank.

    The function must be importable, and starts its own parallel_context. A rank that raises or dies fails the call, once
    the others have ended too, or AFTER_A_FAILURE_S later.

    Raises:
        AssertionError: what each failed rank said, the likely cause first: ranks that died, then errors, then ranks that
            lost another one.
        TimeoutError: no rank ended for `timeout_s`.
    """
    # The ranks meet at a store that this process serves, as torchrun's agent does: its port is taken before they start.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank, args=(rank, ranks, store.port, sender, function, arguments), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results, failures = _collect(pipes, processes, timeout_s)
        for process, rank in zip(processes, range(ranks), strict=True):
            if rank not in failures:
                process.join(timeout=0 if failures else 30)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert not failures, "\n".join(f"rank {rank}: {text}" for rank, (_, text) in _by_cause(failures))
    return results


def _collect(pipes: list, processes: list, timeout_s: float) -> tuple[list[Any], dict[int, tuple[str, str]]]:
    """The results of the ranks, and of those that failed the name of the error (empty: it died) and what they said."""
    results: list[Any] = [None] * len(pipes)
    failures: dict[int, tuple[str, str]] = {}
    pending = dict(zip(pipes, range(len(pipes)), strict=True))
    end = None
    while pending:
        left = timeout_s if end is None else max(0.0, end - time.monotonic())
        ready: list[Any] = multiprocessing.connection.wait(list(pending), timeout=left)
        if not ready and failures:
            break
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} of {len(pipes)} said nothing for {timeout_s} s")
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                error, value = pipe.recv()
            except EOFError:
                processes[rank].join(timeout=10)
                error, value = "", f"died (exit code {processes[rank].exitcode})"
            if error is None:
                results[rank] = value
            else:
                failures[rank] = (error, value)
        if failures and end is None:
            end = time.monotonic() + AFTER_A_FAILURE_S
    return results, failures


def _by_cause(failures: dict[int, tuple[str, str]]) -> list[tuple[int, tuple[str, str]]]:
    return sorted(failures.items(), key=lambda item: (item[1][0] != "", item[1][0] == PeerLostError.__name__, item[0]))


def _rank(rank: int, ranks: int, port: int, sender: Any, function: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    try:
        sender.send((None, function(*arguments)))
    except BaseException as error:
        sender.send((type(error).__name__, traceback.format_exc()))
        os._exit(1)


def cli(
    *arguments: str, cwd: Path | None = None, timeout_s: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """`python -m flagscale_like ARGUMENTS`, as text."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **environment}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-m", "flagscale_like", *arguments],
        cwd=cwd or REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
