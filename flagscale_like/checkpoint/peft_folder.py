"""LoRA adapters in peft's format: adapter_config.json and adapter_model.safetensors.

Both ways are exact. On export, q, k and v (gate and up) repeat their common A, and B is cut by the family's own rule, as the
rows of the weight are. On import, A's that differ are stacked, and B has a block for each: of q, k and v with rank r becomes
rank 3 r. Where a matrix then has a smaller rank than another one, A gets rows whose columns of B are 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagscale_like import json_files
from flagscale_like.arch import ModelArch, Parameter, parameters_by_name
from flagscale_like.checkpoint.adapters import Adapters, Base, identify, lora_of
from flagscale_like.checkpoint.format import finish_folder, specs_of, write_fragments
from flagscale_like.checkpoint.fragments import Fragment, copy_overlap
from flagscale_like.checkpoint.hf import copy_tokenizer, written_aside
from flagscale_like.checkpoint.manifest import STATE, write_json
from flagscale_like.checkpoint.tensor_file import TensorFile, write_tensors
from flagscale_like.config import Lora
from flagscale_like.errors import CheckpointError, ConversionError
from flagscale_like.families import find_family
from flagscale_like.families.weight_map import Rule
from flagscale_like.json_files import BAD_JSON

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
# Keys of adapter_config.json that are read, or say nothing about what the adapter computes.
READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"),
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "init_lora_weights"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "megatron_config", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
# Initialisations that leave the base's weights as they are.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")


def is_peft_folder(path: Path) -> bool:
    """Whether a folder holds an adapter in peft's format."""
    return (path / CONFIG).is_file()


def layer_rules(arch: ModelArch) -> list[tuple[Parameter, Rule]]:
    """Every layer matrix that an adapter in peft's format may stand beside, with the family's rule for it.

    Those of experts are not among them: transformers holds them stacked, and peft has another format for those.
    """
    table = parameters_by_name(arch)
    rules = find_family(arch.family).rules(arch)
    return [(table[rule.core], rule) for rule in rules if table[rule.core].role.is_layer_matrix and rule.expert is None]


class PeftFolder:
    """An adapter in peft's format under megatron-core's names, read like a checkpoint of adapters. Held in memory.

    Args:
        arch: of the base.

    Attributes:
        state: `lora`, the options, as a checkpoint's state.json has them.

    Raises:
        ConversionError: the folder cannot be read, is of another model, or computes what native adapters do not.
    """

    reads_in_threads = True

    def __init__(self, folder: Path, arch: ModelArch) -> None:
        self.folder, self.arch = Path(folder), arch
        self.options = _read_options(self.folder)
        self._found = _read_tensors(self.folder)
        stacks = {matrix: self._stack(matrix, rule) for matrix, rule in layer_rules(arch)}
        if self._found:
            raise self._fail(f"no layer matrix of {arch.family} has {sorted(self._found)[0]}")
        self.lora = self._lora([(m, a.shape[0]) for m, (a, _, _) in stacks.items() if len(a)])
        self.state: dict[str, Any] = {"lora": self.lora.model_dump(mode="json")}
        self._tensors: dict[str, Tensor] = {}
        for matrix, (a, b, magnitude) in stacks.items():
            if matrix.module in self.lora.targets:
                self._add(matrix, a, b, magnitude)

    def __reduce__(self) -> tuple[type[PeftFolder], tuple[Path, ModelArch]]:
        """Another process opens the folder itself."""
        return PeftFolder, (self.folder, self.arch)

    def _fail(self, message: str) -> ConversionError:
        return ConversionError(f"{self.folder}: {message}")

    def _lora(self, ranks: list[tuple[Parameter, int]]) -> Lora:
        """The options of native adapters that compute the same."""
        if not ranks:
            raise self._fail(f"{WEIGHTS} holds no adapter")
        own, options = self.options, {}
        rank = max(rank for _, rank in ranks)
        share = rank / own["r"]
        options["alpha"] = own["lora_alpha"] * (share**0.5 if own["use_rslora"] else share)
        names = tuple(dict.fromkeys(matrix.module for matrix, _ in ranks))
        lora = Lora(
            rank=rank,
            targets=names,
            dropout=own["lora_dropout"],
            rslora=own["use_rslora"],
            dora=own["use_dora"],
            **options,
        )
        try:
            lora.check(self.arch)
        except ValueError as error:
            raise self._fail(f"its A's, stacked, do not fit: {error}") from None
        return lora

    def _stack(self, matrix: Parameter, rule: Rule) -> tuple[Tensor, Tensor, Tensor | None]:
        """A [rank, in], B [out, rank] and the magnitudes of one matrix, its different A's stacked; rank 0 without any."""
        parts, different = [], []
        shapes = rule.hf_shapes(self.arch)
        for name, (rows, columns) in zip(rule.hf, shapes, strict=True):
            stem, rank = PREFIX + name.removesuffix(".weight"), self.options["r"]
            a, b = (self._found.pop(f"{stem}.lora_{letter}.weight", None) for letter in "AB")
            if (a is None) != (b is None):
                raise self._fail(f"{stem} has one of lora_A and lora_B, not both")
            if a is not None and b is not None and (a.shape, b.shape) != ((rank, columns), (rows, rank)):
                raise self._fail(
                    f"{stem}: A is {list(a.shape)} and B {list(b.shape)}, rank {rank} of a matrix of {rows} x {columns} "
                    f"has {[rank, columns]} and {[rows, rank]}: it is an adapter of another model"
                )
            length = self._found.pop(f"{stem}.{MAGNITUDE}", None)
            if length is not None and length.shape != (rows,):
                raise self._fail(
                    f"{stem}: {MAGNITUDE} is {list(length.shape)}, of a matrix of {rows} rows it is [{rows}]"
                )
            if a is not None and not any(torch.equal(a, other) for other in different):
                different.append(a)
            parts.append((rows, a, b, length))
        wide = []
        for rows, a, b, _ in parts:
            blocks = [
                b if a is not None and torch.equal(a, other) else torch.zeros(rows, len(other)) for other in different
            ]
            wide.append(torch.cat(blocks, dim=1) if blocks else torch.zeros(rows, 0))
        a = torch.cat(different) if different else torch.zeros(0, matrix.shape[1])
        lengths, magnitude = [length for *_, length in parts], None
        if self.options["use_dora"] and different:
            if any(length is None for length in lengths):
                raise self._fail(
                    f"a part of {matrix.name} has no {MAGNITUDE}: with DoRA, all parts of a matrix need one"
                )
            magnitude = rule.to_core(tuple(lengths), self.arch)
        b = rule.to_core(tuple(wide), self.arch) if different else torch.zeros(matrix.shape[0], 0)
        return a, b, magnitude

    def _add(self, matrix: Parameter, a: Tensor, b: Tensor, magnitude: Tensor | None) -> None:
        """Take a matrix's adapter, filled up to the common rank: new rows of A, for which B is 0."""
        at, missing, columns = matrix.name.removesuffix("weight") + "lora.", self.lora.rank - len(a), matrix.shape[1]
        if missing:
            digest = hashlib.sha256(matrix.name.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
            new = torch.empty(missing, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
            a, b = torch.cat([a, new]), torch.cat([b, torch.zeros(len(b), missing)], dim=1)
        self._tensors |= {at + "a": a, at + "b": b.contiguous()}
        if self.lora.dora and magnitude is None:
            raise self._fail(f"{matrix.name} has no {MAGNITUDE}: with DoRA, the matrix needs one in every layer")
        if magnitude is not None:
            self._tensors[at + "magnitude"] = magnitude

    # As a checkpoint of adapters is read

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def global_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def full(self, key: str, kind: str = "param", dtype: torch.dtype | None = None) -> Tensor:
        assert kind == "param", kind
        return self._tensors[key].to(dtype or torch.float32)

    def check(self, target: Fragment) -> None:
        if self.shapes().get(target.key) != target.global_shape:
            raise self._fail(f"{target.key} is {self.shapes().get(target.key)}, the model's is {target.global_shape}")

    def read(self, kind: str, target: Fragment, out: Tensor) -> None:
        full = self.full(target.key, kind)
        whole = Fragment(target.key, tuple(full.shape), (0,) * full.dim(), tuple(full.shape), 0, full.numel())
        copy_overlap(whole, full.reshape(-1), target, out)


def _read_options(folder: Path) -> dict[str, Any]:
    """adapter_config.json, its defaults filled in.

    Raises:
        ConversionError: it cannot be read, or asks for something that native adapters do not compute.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        options = {
            "r": int(values["r"]),
            "lora_alpha": float(values.get("lora_alpha", 8)),
            "lora_dropout": float(values.get("lora_dropout") or 0.0),
            "use_rslora": bool(values.get("use_rslora", False)),
            "use_dora": bool(values.get("use_dora", False)),
        }
    except (OSError, *BAD_JSON, KeyError, TypeError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from None
    if values.get("peft_type") != "LORA":
        raise ConversionError(f"{path}: peft_type is {values.get('peft_type')!r}, supported: 'LORA'")
    if values.get("init_lora_weights") not in PLAIN_INIT:
        raise ConversionError(
            f"{path}: init_lora_weights {values['init_lora_weights']!r} changes the base's weights, which the adapter does "
            "not hold: convert it to a plain one with peft first"
        )
    neutral = (None, False, [], {}, "none")
    strange = sorted(key for key, value in values.items() if key not in READ and value not in neutral)
    if strange:
        raise ConversionError(f"{path}: {strange[0]} is {values[strange[0]]!r}, which native adapters do not compute")
    if options["r"] <= 0 or not options["lora_alpha"] > 0:
        raise ConversionError(f"{path}: r ({options['r']}) and lora_alpha ({options['lora_alpha']}) must be above 0")
    return options


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """adapter_model.safetensors, in fp32."""
    path = folder / WEIGHTS
    try:
        file = TensorFile(path)
    except FileNotFoundError:
        pickles = sorted(found.name for found in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle and is not read: save the adapter as safetensors" if pickles else ""
        raise ConversionError(f"{folder}: holds no {WEIGHTS}{hint}") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: {error}") from None
    names = {name.replace(f"{MAGNITUDE}.weight", MAGNITUDE): name for name in file.specs}
    return {name: file.get_tensor(own, whole=True).float().clone() for name, own in names.items()}


def import_adapter(folder: Path, base: Base, out: Path) -> Lora:
    """Write a native checkpoint of adapters from a folder in peft's format. It loads on any layout, beside `base`.

    Returns:
        The adapters' options.

    Raises:
        ConversionError: see PeftFolder; or `out` exists or cannot be written.
    """
    adapters = PeftFolder(folder, base.arch)
    tensors = {key: adapters.full(key).contiguous() for key in adapters.keys()}
    fragments = [
        Fragment(key, tuple(t.shape), (0,) * t.dim(), tuple(t.shape), 0, t.numel()) for key, t in tensors.items()
    ]
    flat = [(f"{i}.param", tensor.view(-1)) for i, tensor in enumerate(tensors.values())]
    with written_aside(out) as temporary:
        path = temporary / "rank_00000.safetensors"
        written = write_fragments(path, fragments, (tensor for _, tensor in flat), specs_of(flat))
        state = {
            "step": 0,
            "consumed_samples": 0,
            "layout": {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
            "model": base.arch.model_dump(mode="json"),
            "lora": adapters.state["lora"],
            "base": identify(base),
        }
        finish_folder(temporary, [written], [write_json(temporary / STATE, state)])
    return adapters.lora


def export_adapter(
    adapters: Adapters, out: Path, *, base_name: str | None, dtype: torch.dtype, tokenizer: Path | None
) -> None:
    """Write a checkpoint's adapters as peft reads them.

    Args:
        base_name: the base's Hugging Face folder, for adapter_config.json; None where there is none.
        tokenizer: its folder, to be copied; None for none.

    Raises:
        CheckpointError: the checkpoint holds something else beside adapters.
        ConversionError: `out` exists or cannot be written.
    """
    lora, arch, found = lora_of(adapters), adapters.arch, {}
    left = set(adapters.keys())
    for matrix, rule in layer_rules(arch):
        if matrix.module not in lora.targets:
            continue
        at = matrix.name.removesuffix("weight") + "lora."
        a, b = adapters.full(at + "a", dtype=dtype), adapters.full(at + "b", dtype=dtype)
        lengths: Sequence[Tensor | None] = (None,) * len(rule.hf)
        if lora.dora:
            lengths = rule.to_hf(adapters.full(at + "magnitude", dtype=dtype), arch)
        for name, part, length in zip(rule.hf, rule.to_hf(b, arch), lengths, strict=True):
            stem = PREFIX + name.removesuffix(".weight")
            found |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": part.contiguous()}
            if length is not None:
                found[f"{stem}.{MAGNITUDE}"] = length.contiguous()
        left -= {at + "a", at + "b", at + "magnitude"}
    if of_experts := sorted(name for name in left if ".experts." in name):
        raise CheckpointError(
            f"{adapters.folder}: holds {of_experts[0]}: adapters of experts have no place in peft's format: merge them into "
            "the base with `convert export --merge`, or train without linear_fc1 and linear_fc2 in lora.targets"
        )
    if left:
        raise CheckpointError(f"{adapters.folder}: holds {sorted(left)[0]}, which is no part of an adapter")
    names = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in found})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": names,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with written_aside(out) as temporary:
        write_tensors(temporary / WEIGHTS, specs_of(found.items()), iter(found.values()), {"format": "pt"})
        json_files.write_json(temporary / CONFIG, config)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary)
