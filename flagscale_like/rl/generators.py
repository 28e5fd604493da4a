"""What draws a run's rollouts, by rl.rollout.engine: the trainer's own weights, a whole copy on each rank, or vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from flagscale_like.checkpoint.hf import tokenizer_ids, write_settings
from flagscale_like.config import RunConfig
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import required
from flagscale_like.families import find_family
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.hf_weights import hf_weights
from flagscale_like.generation.refit import RefitEngine
from flagscale_like.generation.rollout import GenerationEngine
from flagscale_like.generation.vllm import VllmEngine, check_installed, open_llm
from flagscale_like.rl.apart import DrawnApart
from flagscale_like.rl.prompts import Words
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import agree
from flagscale_like.runtime.precision import DTYPES

NOT_RUN = "rollouts are drawn by vLLM, with which this program is not yet run on a GPU: watch policy/engine-difference"


def check_generator(config: RunConfig) -> None:
    """Refuse an engine that is not to be had, before anything is built.

    Raises:
        PlatformError: vLLM is asked for, and is not installed.
    """
    if config.required_rl.rollout.engine == "vllm":
        check_installed()


def generator_notes(config: RunConfig) -> list[str]:
    """What to tell the user about what draws."""
    engine, layout = config.required_rl.rollout.engine, config.parallel
    if engine == "vllm":
        return [NOT_RUN]
    waste = {
        f"through {layout.pp} pipeline stages, of which one works at a time": layout.pp > 1,
        f"by {layout.cp} context-parallel ranks that all draw the same": layout.cp > 1,
    }
    way_out = "rl.rollout.engine refit draws on all ranks, with a whole copy of the policy on each"
    return [f"rollouts are drawn {how}: {way_out}" for how, found in waste.items() if found and engine == "own"]


def build_generator(config: RunConfig, engine: Engine, words: Words) -> GenerationEngine:
    """What draws rollouts with the policy's weights. All ranks call it.

    Args:
        engine: the policy.
    """
    drawing, ctx = config.required_rl.rollout, engine.ctx
    if ctx.bridge is not None and not ctx.bridge.is_apart:
        return DrawnApart(engine, ctx.bridge)
    if drawing.engine == "vllm":
        return _vllm(config, engine, words)
    kind = RefitEngine if drawing.engine == "refit" else OwnEngine
    return kind(engine, rows=drawing.rows, room=config.train.seq_length, decode=words.tokenizer.decode)


def load_weights(generator: GenerationEngine, engine: Engine, version: int) -> None:
    """Give a generator the policy's weights of a version, where it does not have them. All ranks call it alike."""
    if generator.version != version:
        generator.load(_named_weights(engine), version)


def _named_weights(engine: Engine) -> Iterable[tuple[str, Tensor]]:
    """The weights by their Hugging Face names; nothing is computed before the first is taken."""
    return hf_weights(engine, DTYPES[engine.spec.precision])


def _vllm(config: RunConfig, engine: Engine, words: Words) -> VllmEngine:
    """vLLM on this rank's device. It sleeps until it gets weights."""
    folder, room, dtype = RunFolder(config.run_dir).vllm, config.train.seq_length, DTYPES[config.train.precision]
    agree(engine.ctx, lambda: _describe(config, folder, words) if engine.ctx.is_main else None)
    memory = config.required_rl.rollout.vllm.memory
    llm = open_llm(str(folder), room=room, dtype=dtype, memory=memory, seed=config.train.seed)
    found = VllmEngine(llm, engine.spec.arch, engine.ctx, dtype=dtype, room=room)
    found.sleep()
    return found


def _describe(config: RunConfig, folder: Path, words: Words) -> None:
    """Write what vLLM builds the model from: config.json and the tokenizer."""
    arch, tokenizer = config.model, Path(required(words.folder, "data.tokenizer"))
    if not arch.max_position_embeddings:
        arch = arch.model_copy(update={"max_position_embeddings": config.train.seq_length})
    folder.mkdir(parents=True, exist_ok=True)
    described = find_family(arch.family).config_with_head(arch, 0)
    write_settings(folder, described, DTYPES[config.train.precision], tokenizer_ids(tokenizer), tokenizer)
