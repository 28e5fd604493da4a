"""Convert a Hugging Face folder to a native checkpoint and back, one tensor at a time, in several processes.

Both ways work alike: plan the files from names and shapes alone, let the processes write them, write the small files beside
them, and rename the folder. An interrupted conversion leaves a hidden temporary folder, and no folder that looks whole.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like import json_files
from flagscale_like.arch import OUTPUT_NAME, ModelArch
from flagscale_like.checkpoint.adapters import MergedWeights
from flagscale_like.checkpoint.companions import (
    GENERATION,
    Origin,
    code_files,
    read_companions,
    tokenizer_files,
    write_companions,
)
from flagscale_like.checkpoint.format import (
    CheckpointReader,
    WrittenFile,
    finish_folder,
    is_embedder,
    value_heads_of,
    write_fragments,
)
from flagscale_like.checkpoint.hf_folder import INDEX, WEIGHTS, HfFolder, fragment_of
from flagscale_like.checkpoint.manifest import COMPANIONS, STATE, fsync_folder, write_json
from flagscale_like.checkpoint.tensor_file import TensorSpec, ahead, write_tensors
from flagscale_like.data.tokenizer import special_ids
from flagscale_like.errors import CheckpointError, ConversionError, DataError
from flagscale_like.families import find_family
from flagscale_like.families.family import Family
from flagscale_like.families.weight_map import Exact, Rule
from flagscale_like.runtime.precision import DTYPES, dtype_word

if TYPE_CHECKING:  # megatron-core takes seconds to load, and a conversion needs none of it
    from flagscale_like.runtime.parallel import ParallelContext

MAX_FILE_BYTES = 4 << 30
T = TypeVar("T")


def split_rules(rules: list[T], nbytes: Callable[[T], int], *, files: int, max_bytes: int) -> list[list[T]]:
    """Divide the rules, or other things that bytes are written of, into consecutive groups, one for each file.

    Args:
        nbytes: the bytes of a rule's tensors.
        files: the least number of files, of about the same size.
        max_bytes: the most bytes of a file. One rule may exceed it alone.
    """
    sizes = [nbytes(rule) for rule in rules]
    limit = min(max_bytes, -(-sum(sizes) // files))
    groups: list[list[T]] = [[]]
    held = 0
    for rule, size in zip(rules, sizes, strict=True):
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(rule)
        held += size
    return groups


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`. It takes the name `out` at the end, and is removed on an error.

    Raises:
        ConversionError: `out` exists, or could not be written.
    """
    if out.exists():
        raise ConversionError(f"{out}: exists; choose another folder or remove it")
    temporary = out.with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        fsync_folder(temporary)
        os.replace(temporary, out)
        fsync_folder(out.absolute().parent)
    except (OSError, BrokenProcessPool) as error:
        raise ConversionError(f"{out}: could not be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def in_processes(job: Callable[[int], Any], count: int, workers: int) -> list[Any]:
    """[job(0), ..., job(count - 1)], by up to `workers` processes; the job is picklable."""
    if workers <= 1 or count <= 1:
        return [job(index) for index in range(count)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(workers, count), mp_context=context) as pool:
        return list(pool.map(job, range(count)))


# From Hugging Face to native


@dataclass(frozen=True)
class _ImportFile:
    """Writes one file of an import; called with its number. Picklable: its process opens the folder itself."""

    source: Path
    target: Path
    groups: list[list[Rule]]

    def __call__(self, index: int) -> WrittenFile:
        folder, rules = HfFolder(self.source), self.groups[index]
        fragments = [fragment_of(rule, folder.global_shape(rule.core)) for rule in rules]
        specs = [TensorSpec(f"{i}.param", folder.dtype(rule.core), (rule.numel,)) for i, rule in enumerate(rules)]
        tensors = (folder.part(rule).view(-1) for rule in rules)
        path = self.target / f"rank_{index:05d}.safetensors"
        return write_fragments(path, fragments, ahead(tensors), specs)


def import_folder(
    source: Path | HfFolder, out: Path, *, workers: int = 1, max_file_bytes: int = MAX_FILE_BYTES
) -> ModelArch:
    """Write a native checkpoint that holds the weights alone, in the Hugging Face folder's dtypes. It loads on any layout.

    Args:
        source: the folder, perhaps opened.
        workers: how many processes write; each writes one file at a time.
        max_file_bytes: the most bytes of a file, unless one tensor has more.

    Returns:
        The model's architecture.

    Raises:
        ConversionError: the folder cannot be read (see HfFolder), or `out` exists or cannot be written.
    """
    folder = source if isinstance(source, HfFolder) else HfFolder(source)
    origin = folder.origin()
    groups = split_rules(
        folder.rules,
        lambda rule: rule.numel * folder.dtype(rule.core).itemsize,
        files=workers,
        max_bytes=max_file_bytes,
    )
    with written_aside(out) as temporary:
        written = in_processes(_ImportFile(folder.folder, temporary, groups), len(groups), workers)
        beside = write_companions(read_companions([folder.folder], origin.auto_map), temporary)
        state = {
            "step": 0,
            "consumed_samples": 0,
            "layout": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
            "model": folder.arch.model_dump(mode="json"),
            "hugging_face": origin.record(),
            **({"embedder": True} if folder.embedder else {}),
        }
        finish_folder(temporary, written, [write_json(temporary / STATE, state), *beside])
    return folder.arch


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy those of the tokenizer's files that exist. (generation_config.json is written, not copied.)"""
    found = [source / name for name in tokenizer_files(source)]
    if found:
        target.mkdir(exist_ok=True)
    for path in found:
        shutil.copyfile(path, target / path.name)


# From native to Hugging Face

ExportSource = CheckpointReader | HfFolder | MergedWeights


@dataclass(frozen=True)
class ExportPlan:
    """Which tensors go to which file of a Hugging Face folder, from names and shapes alone. Picklable.

    Attributes:
        source: the weights: a native checkpoint, or a base with adapters merged into it. Another process opens it itself.
        arch: the model's, without a NormHead where the target family has none.
        dtype: of all weights; None where each tensor keeps its own.
        normalize_head: write the output matrix with normalised rows, in place of a NormHead.
        groups: the rules of each file.
        specs: the tensors of each file.
        value_heads: outputs of the value head; 0 for a language model.
        embedder: whether it is an embedding model, which is written without an output layer.
    """

    source: ExportSource
    arch: ModelArch
    family_name: str
    dtype: torch.dtype | None
    normalize_head: bool
    groups: list[list[Rule]]
    specs: list[list[TensorSpec]]
    value_heads: int = 0
    embedder: bool = False

    @property
    def family(self) -> Family:
        """The family it is written as."""
        return find_family(self.family_name)

    @property
    def files(self) -> list[str]:
        """Names of the files with weights."""
        count = len(self.groups)
        return [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


@dataclass(frozen=True)
class ExportFile:
    """Writes one file of an export; called with its number. Picklable."""

    plan: ExportPlan
    target: Path

    def __call__(self, index: int) -> None:
        specs = self.plan.specs[index]
        tensors = ahead(self._tensors(self.plan.source, index))
        write_tensors(self.target / self.plan.files[index], specs, tensors, {"format": "pt"})

    def _tensors(self, reader: ExportSource, index: int) -> Iterator[Tensor]:
        plan = self.plan
        dtypes = iter(spec.dtype for spec in plan.specs[index])
        for rule in plan.groups[index]:
            own = list(itertools.islice(dtypes, len(rule.hf)))
            if plan.normalize_head and rule.core == "output_layer.weight":
                full = F.normalize(reader.full(rule.core, dtype=torch.float32), dim=-1).to(own[0])
            else:
                full = _part(reader, rule, own[0])
            yield from rule.to_hf(full, plan.arch)


def _part(reader: ExportSource, rule: Rule, dtype: torch.dtype) -> Tensor:
    """What one rule is about: a whole tensor, or one expert's matrix, and no more is held."""
    if rule.expert is None:
        return reader.full(rule.core, dtype=dtype)
    out = torch.empty(rule.shape, dtype=dtype)
    reader.read("param", fragment_of(rule, reader.global_shape(rule.core)), out.view(-1))
    return out


def plan_export(
    reader: ExportSource,
    *,
    family: str | None = None,
    dtype: str = "bf16",
    files: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> ExportPlan:
    """Lay out an export, and check it before anything is written.

    Args:
        family: the family to write the model as; None for its own. Another family must compute the same, or differ in
            NormHead alone: then the output matrix is written with normalised rows.
        dtype: bf16, fp16, fp32, or stored (each tensor's own).
        files: the least number of files.
        max_file_bytes: the most bytes of a file, unless one tensor has more.

    Raises:
        ConversionError: the family is not known, or cannot compute the model.
        CheckpointError: the checkpoint lacks a tensor, has one too many, or one of another shape.
    """
    arch = reader.arch
    if not arch.max_position_embeddings:  # no limit was set: what was trained is what is known
        arch = arch.model_copy(update={"max_position_embeddings": trained_length(reader)})
    target = find_family(family or arch.family)
    embedder = is_embedder(reader)
    value_heads = 0 if embedder else value_heads_of(reader)
    vocabulary = not value_heads and not embedder
    fold = arch.norm_head and "norm_head" not in target.supports and vocabulary
    arch = arch.model_copy(update={"norm_head": arch.norm_head and not fold and vocabulary})
    target.config_with_head(arch, value_heads, embedder=embedder)
    rules = target.rules_with_head(arch, value_heads, embedder=embedder)
    extra = set(reader.keys()) - {rule.core for rule in rules} - ({OUTPUT_NAME} if embedder else set())
    if extra:
        raise CheckpointError(f"{reader.folder}: holds tensors that {target.name} does not have: {sorted(extra)[:3]}")
    for rule in rules:
        saved = reader.global_shape(rule.core)
        if rule.expert is not None:
            saved = saved[1:]
        rows_alike = saved[0] == rule.shape[0] or (
            rule.shape[0] == arch.padded_vocab_size() and saved[0] >= arch.vocab_size
        )
        if saved[1:] != rule.shape[1:] or not rows_alike:
            raise CheckpointError(f"{reader.folder}: {rule.core} has shape {saved}, {target.name} needs {rule.shape}")

    def dtype_of(rule: Rule) -> torch.dtype:
        return reader.dtype(rule.core) if dtype == "stored" or isinstance(rule, Exact) else DTYPES[dtype]

    groups = split_rules(rules, lambda r: r.numel * dtype_of(r).itemsize, files=files, max_bytes=max_file_bytes)
    specs = [
        [
            TensorSpec(name, dtype_of(rule), shape)
            for rule in group
            for name, shape in zip(rule.hf, rule.hf_shapes(arch), strict=True)
        ]
        for group in groups
    ]
    return ExportPlan(reader, arch, target.name, DTYPES.get(dtype), fold, groups, specs, value_heads, embedder)


def trained_length(reader: ExportSource) -> int:
    """Tokens of a sequence of the run that saved a checkpoint; 0 where it does not say."""
    state = getattr(reader, "state", None) or getattr(getattr(reader, "adapters", None), "state", None) or {}
    try:
        return int(state["config"]["train"]["seq_length"])
    except (KeyError, TypeError, ValueError):
        return 0


def finish_export(plan: ExportPlan, folder: Path, *, tokenizer: Path | None, origin: Origin) -> None:
    """Write the files beside the weights: index, config.json, generation_config.json, tokenizer.

    Args:
        tokenizer: its folder, or None.
        origin: of the weights. Its ids of bos, eos and pad are written, and the tokenizer's where it is another one.
    """
    if len(plan.groups) > 1:
        weight_map = {spec.name: file for file, specs in zip(plan.files, plan.specs, strict=True) for spec in specs}
        total = sum(spec.nbytes for specs in plan.specs for spec in specs)
        write_index(folder, weight_map, total)
    ids = tokenizer_ids(tokenizer)
    same = origin.has_tokenizer(tokenizer)
    ids = (dict(origin.token_ids) or ids) if same else {**origin.token_ids, **ids}
    rules = [rule for group in plan.groups for rule in group for _ in rule.hf]
    specs = [spec for specs in plan.specs for spec in specs]
    dtypes = {spec.dtype for rule, spec in zip(rules, specs, strict=True) if not isinstance(rule, Exact)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    config = plan.family.config_with_head(plan.arch, plan.value_heads, embedder=plan.embedder)
    config |= copy_code(plan, folder, origin)
    write_settings(folder, config, dtype, ids, tokenizer, generates=not plan.value_heads and not plan.embedder)


def write_settings(
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    ids: Mapping[str, int],
    tokenizer: Path | None,
    *,
    generates: bool = True,
) -> None:
    """Write what a Hugging Face folder has beside the weights: config.json, generation_config.json, the tokenizer.

    Args:
        config: the family's keys of config.json.
        dtype: of the weights.
        ids: of bos, eos and pad.
        generates: whether the model is a language model.
    """
    word = dtype_word(dtype)
    json_files.write_json(folder / "config.json", {**config, "dtype": word, "torch_dtype": word, **ids})
    if generates:
        json_files.write_json(folder / GENERATION, generation_settings(tokenizer, ids))
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)


def copy_code(plan: ExportPlan, folder: Path, origin: Origin) -> dict[str, Any]:
    """Copy the code that the origin has for transformers, where the model goes out under the family that it came in.

    Returns:
        the keys of config.json that name it.
    """
    held = plan.source.folder / COMPANIONS
    names = code_files(held, origin.auto_map)
    if origin.model_type != plan.family.model_type or not names:
        return {}
    for name in names:
        shutil.copyfile(held / name, folder / name)
    return {"auto_map": dict(origin.auto_map)}


def generation_settings(tokenizer: Path | None, ids: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation: those beside the tokenizer, such as all ids that end an answer, or the tokenizer's ids."""
    path = tokenizer / GENERATION if tokenizer is not None else None
    if path is None or not path.is_file():
        return {"_from_model_config": True, **ids}
    return dict(ids) | json.loads(path.read_text(encoding="utf-8"))


def export(
    reader: ExportSource,
    out: Path,
    *,
    family: str | None = None,
    dtype: str = "bf16",
    tokenizer: Path | None = None,
    workers: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
    beside: Callable[[Path], None] = lambda folder: None,
) -> ExportPlan:
    """Write a Hugging Face folder: safetensors with their index, config.json, generation_config.json, the tokenizer.

    Args:
        workers: how many processes write; each writes one file at a time.
        family, dtype, max_file_bytes: see plan_export().
        tokenizer: folder of the tokenizer to copy, or None.
        beside: writes further files into the folder before it gets its name.

    Raises:
        ConversionError: `out` exists or cannot be written; the family cannot compute the model.
        CheckpointError: see plan_export().
    """
    plan = plan_export(reader, family=family, dtype=dtype, files=workers, max_file_bytes=max_file_bytes)
    with written_aside(out) as temporary:
        in_processes(ExportFile(plan, temporary), len(plan.groups), workers)
        finish_export(plan, temporary, tokenizer=tokenizer, origin=reader.origin())
        beside(temporary)
    return plan


def export_on_ranks(
    reader: ExportSource, out: Path, ctx: ParallelContext, *, dtype: str, tokenizer: Path | None
) -> None:
    """Like export(), but each rank of a run writes some of the files, and a folder at `out` is replaced. All ranks call it.

    Raises:
        ConversionError: a rank could not write. Raised on every rank.
    """
    plan = plan_export(reader, dtype=dtype, files=ctx.world_size)
    aside = out.with_name(str(ctx.broadcast(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")))

    def write() -> None:
        aside.mkdir(parents=True, exist_ok=True)
        for index in range(ctx.rank, len(plan.groups), ctx.world_size):
            ExportFile(plan, aside)(index)

    def publish() -> None:
        finish_export(plan, aside, tokenizer=tokenizer, origin=reader.origin())
        fsync_folder(aside)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(aside, out)

    problems: list[str] = []
    for work in (write, publish):
        problem = None
        try:
            if not problems and (work is write or ctx.is_main):
                work()
        except (OSError, ConversionError) as error:
            problem = f"rank {ctx.rank}: {error}"
        problems += [found for found in ctx.gather(problem) if found]
    if problems:
        if ctx.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise ConversionError(f"{out}: could not be written: {'; '.join(problems)}; the checkpoint is whole")


def tokenizer_ids(tokenizer: Path | None) -> dict[str, int]:
    """The ids of bos, eos and pad that a tokenizer folder has.

    Raises:
        ConversionError: it cannot be read.
    """
    if tokenizer is None:
        return {}
    try:
        return special_ids(tokenizer)
    except DataError as error:
        raise ConversionError(str(error)) from None


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Write model.safetensors.index.json, which says which file holds which tensor."""
    json_files.write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
