"""Native checkpoint -> Hugging Face folder, a few tensors at a time, and the proof that both compute the same."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.manifest import fsync_folder
from flagscale_like.checkpoint.store import load_model
from flagscale_like.errors import CheckpointError, ConversionError
from flagscale_like.families import find_family
from flagscale_like.runtime.parallel import ParallelContext

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)


def export(
    reader: CheckpointReader,
    out: Path,
    *,
    dtype: str = "bf16",
    tokenizer: Path | None = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write safetensors shards with their index, config.json, generation_config.json and the tokenizer.

    The folder is written aside and renamed last: an interrupted export leaves nothing under `out`.

    Args:
        max_shard_bytes: a shard is closed before it grows past this, which also bounds the memory in use.

    Raises:
        ConversionError: `out` exists.
        CheckpointError: the checkpoint lacks a tensor or has one too many.
    """
    if out.exists():
        raise ConversionError(f"{out}: exists; choose another folder or remove it")
    arch = ModelArch.model_validate(reader.state["model"])
    family = find_family(arch.family)
    temporary = out.with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        config = {**family.hf_config(arch), "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]}
        ids = _token_ids(tokenizer)
        _write_shards(_tensors(reader, arch, family, DTYPES[dtype]), temporary, max_shard_bytes)
        _write_json(temporary / "config.json", {**config, **ids})
        _write_json(temporary / "generation_config.json", {"_from_model_config": True, **ids})
        for name in TOKENIZER_FILES:
            if tokenizer and (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, temporary / name)
        fsync_folder(temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors(
    reader: CheckpointReader, arch: ModelArch, family: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    rules = family.rules(arch)
    unknown = set(reader.keys()) - {rule.core for rule in rules}
    if unknown:
        raise CheckpointError(f"{reader.folder}: holds tensors that {arch.family} does not have: {sorted(unknown)[:3]}")
    for rule in rules:
        full = reader.full(rule.core)
        for name, tensor in zip(rule.hf, rule.to_hf(full, arch), strict=True):
            yield name, tensor.to(dtype).contiguous()


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        nonlocal held, size
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if held and size + nbytes > max_shard_bytes:
            close()
        # A view would drag the whole tensor it looks into along.
        held[name] = tensor.clone() if tensor.untyped_storage().nbytes() > nbytes else tensor
        size, total = size + nbytes, total + nbytes
    close()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{index}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _token_ids(tokenizer: Path | None) -> dict[str, int]:
    """bos, eos and pad ids, as the tokenizer folder names them."""
    if tokenizer is None:
        return {}
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConversionError(f"tokenizer {tokenizer}: transformers cannot load it: {error}") from None
    ids = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def compare_logits(
    reader: CheckpointReader,
    folder: Path,
    ctx: ParallelContext,
    *,
    dtype: str,
    tolerance: float = 1e-4,
    tokens: int = 64,
) -> float:
    """Run the native model and transformers' on the same random tokens, both in fp32 from weights rounded to `dtype`.

    Returns:
        The largest difference of a logit, over the largest logit.

    Raises:
        ConversionError: it exceeds `tolerance`, or transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM

    model = load_model(reader, ctx, precision="fp32").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
    arch = model.arch
    length = min(tokens, arch.max_position_embeddings or tokens)
    ids = torch.randint(0, arch.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(ctx.platform.device)
    ours = model(ids, None, None)[..., : arch.vocab_size].float()
    try:
        theirs_model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{folder}: transformers cannot load it: {error}") from None
    theirs = theirs_model.to(ctx.platform.device).eval()(ids).logits.float()
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= tolerance:
        raise ConversionError(
            f"{folder}: its logits differ from the native model's by {difference:.2e} of the largest "
            f"(allowed {tolerance:.0e}): the export is not usable"
        )
    return difference
