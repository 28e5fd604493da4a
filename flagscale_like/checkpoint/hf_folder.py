"""A Hugging Face folder, read like a native checkpoint: the same keys and shapes, on any layout.

Names, shapes and file sizes are compared with config.json before the first tensor is read.
"""

from __future__ import annotations

import functools
import json
import re
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from flagscale_like.arch import OUTPUT_NAME
from flagscale_like.checkpoint.companions import Origin, fingerprint
from flagscale_like.checkpoint.format import is_vocabulary
from flagscale_like.checkpoint.fragments import Fragment, copy_overlap, elements_within, overlaps
from flagscale_like.checkpoint.packed import PackedWeight, WeightFile, with_packed
from flagscale_like.checkpoint.pickle_file import PickleFile
from flagscale_like.checkpoint.tensor_file import TensorFile, TensorSpec
from flagscale_like.errors import ConversionError
from flagscale_like.families import read_config
from flagscale_like.families.quantization import Scheme
from flagscale_like.families.rules import STACKED_NAMES, without_prefix
from flagscale_like.families.settings import Settings
from flagscale_like.families.weight_map import Rule
from flagscale_like.json_files import BAD_JSON

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FORMS = (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)  # in the order in which transformers looks for them
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
BARE_EMBEDDING = "embed_tokens.weight"  # in folders whose names do not begin with `model.`
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_pointer(path: Path) -> bool:
    """Whether git-lfs has left a file's address in its place, as a clone without git-lfs does."""
    with open(path, "rb") as file:
        return file.read(64).startswith(b"version https://git-lfs")


class HfFolder:
    """The weights of a Hugging Face folder under megatron-core's names.

    Attributes:
        family, arch: from config.json.
        value_heads: outputs of a value head, from config.json; 0 for a language model.
        embedder: whether the model has no output layer, as an embedding model.
        rules: the weight map's rule of every tensor of the model.
        left_out: tensors of layers behind the decoder's, for multi-token prediction, which are not read.
        quantization: how its weights are quantized; None where they are not.
        notes: what to tell the user about the folder.
        reads_in_threads: see WeightSource.

    Raises:
        ConversionError: an unknown family; a file missing, truncated or damaged; a tensor missing, unknown, or of another
            shape than config.json gives it.
    """

    reads_in_threads = False

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.family, self.arch = read_config(self.folder)
        settings = Settings.read(self.folder)
        self.value_heads = self.family.value_heads(settings)
        self.quantization = Scheme.of(settings)
        self.embedder = self.family.is_embedder(settings)
        self.notes: list[str] = []
        self._files: dict[str, WeightFile | PackedWeight] = {**self._open_files()}
        if self.quantization is not None:
            try:
                self._files = with_packed(self._files, self.quantization)
            except ValueError as error:
                raise ConversionError(f"{self.folder}: {error}") from None
            scheme = self.quantization
            self.notes.append(
                f"{self.folder}: its weights are INT{scheme.bits} in groups of {scheme.group_size}; they are read as the "
                "numbers that they stand for"
            )
        self.rules = self._named()
        self._by_core: dict[str, list[Rule]] = {}
        for rule in self.rules:
            self._by_core.setdefault(rule.core, []).append(rule)
        self._dtypes: dict[str, torch.dtype] = {}
        self.left_out = self._behind_the_decoder(settings)
        self._check_tensors()
        self._last: tuple[Rule, tuple[int, int], Tensor] | None = None

    def __reduce__(self) -> tuple[type[HfFolder], tuple[Path]]:
        """Another process opens the folder itself."""
        return HfFolder, (self.folder,)

    def _behind_the_decoder(self, settings: Settings) -> list[str]:
        """Tensors of layers that config.json counts as num_nextn_predict_layers, beside those of the decoder."""
        more = settings.get("num_nextn_predict_layers", 0)
        if not isinstance(more, int) or not more:
            return []
        first = self.arch.num_layers
        numbers = {name: int(found.group(1)) for name in self._files if (found := _LAYER.match(name))}
        behind = {name: number for name, number in numbers.items() if first <= number < first + more}
        if behind:
            layers = sorted(set(behind.values()))
            names = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
            self.notes.append(
                f"{self.folder}: left out: {len(behind)} tensors of {names} behind the decoder's {first}, which are for "
                "multi-token prediction"
            )
        return sorted(behind)

    def _open_files(self) -> dict[str, TensorFile | PickleFile]:
        """The file that holds each tensor, by the tensor's name. Of several forms, the one that transformers reads."""
        form = next((form for form in FORMS if (self.folder / form).is_file()), None)
        if form is None:
            others = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f"; of {others[0]} nothing says that it holds the model" if others else ""
            raise ConversionError(f"{self.folder}: holds none of {', '.join(FORMS)}{hint}")
        kind = PickleFile if form in (PICKLE, PICKLE_INDEX) else TensorFile
        weight_map = self._weight_map(form) if form in (INDEX, PICKLE_INDEX) else None
        files = {}
        for name in [form] if weight_map is None else sorted(set(weight_map.values())):
            if name != Path(name).name:
                raise ConversionError(f"{self.folder / form}: names a file outside the folder: {name!r}")
            try:
                files[name] = kind(self.folder / name)
            except FileNotFoundError:
                raise ConversionError(f"{self.folder}: {form} names {name}, which is missing") from None
            except (OSError, ValueError) as error:
                pointer = (self.folder / name).is_file() and is_pointer(self.folder / name)
                reason = "is git-lfs's pointer to the file: fetch the file itself (git lfs pull)" if pointer else error
                raise ConversionError(f"{self.folder / name}: {reason}") from None
        if kind is PickleFile:
            files_are = f"{form} is a pickle" if weight_map is None else f"{len(files)} files of {form} are pickles"
            self.notes.append(
                f"{self.folder}: {files_are}: read by torch.load(weights_only=True), which takes tensors alone; nothing in "
                "the folder was executed"
            )
        if weight_map is None:
            return {tensor: file for file in files.values() for tensor in file.specs}
        for tensor, name in weight_map.items():
            if tensor not in files[name].specs:
                raise ConversionError(f"{self.folder}: {form} says {name} holds {tensor}; it does not")
        return {tensor: files[name] for tensor, name in weight_map.items()}

    def _named(self) -> list[Rule]:
        """The rules with the names of the folder: with or without the prefix `model.`, whatever class config.json names; a
        layer's experts one by one, or as one tensor.
        """
        stacked = self.arch.experts is not None and any(name.endswith(STACKED_NAMES) for name in self._files)
        rules = self.family.rules_with_head(self.arch, self.value_heads, stacked=stacked)
        if self.embedder:
            rules = [rule for rule in rules if rule.core != OUTPUT_NAME]
        return [without_prefix(rule) for rule in rules] if BARE_EMBEDDING in self._files else rules

    def _weight_map(self, index: str) -> dict[str, str]:
        """The name of the file that holds each tensor."""
        try:
            found = json.loads((self.folder / index).read_text(encoding="utf-8"))["weight_map"]
            wrong = next(((k, v) for k, v in found.items() if not isinstance(v, str)), None)
        except (OSError, *BAD_JSON, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(
                f"{self.folder / index}: damaged ({type(error).__name__}: {error}); fetch it again"
            ) from None
        if wrong:
            raise ConversionError(f"{self.folder / index}: damaged ({wrong[0]} is in {wrong[1]!r}); fetch it again")
        return found

    def _check_tensors(self) -> None:
        expected = {
            name: shape for rule in self.rules for name, shape in zip(rule.hf, rule.hf_shapes(self.arch), strict=True)
        }
        where = f"{self.folder} ({self.family.name})"
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise ConversionError(
                f"{where}: {len(missing)} tensors are missing: {', '.join(missing[:3])}{self._prefix_of(missing)}"
            )
        for name in expected:
            spec = self._files[name].specs[name]
            if spec.dtype not in FLOATS:
                raise ConversionError(
                    f"{where}: {name} is {str(spec.dtype).removeprefix('torch.')}; supported: float32, bfloat16, float16. "
                    "Of a quantized model (FP8, INT8, INT4), import the folder that it was made from"
                )
        left_out = set(self.left_out)
        unknown = [
            n for n in self._files if n not in expected and n not in left_out and not self.family.ignored.search(n)
        ]
        if self.arch.tie_embeddings and "lm_head.weight" in unknown:
            self._check_tied("lm_head.weight", "model.embed_tokens.weight")
            unknown.remove("lm_head.weight")
        if unknown:
            raise ConversionError(f"{where}: {len(unknown)} tensors are not known: {', '.join(unknown[:3])}")
        for name, shape in expected.items():
            spec = self._files[name].specs[name]
            if spec.shape != shape:
                raise ConversionError(
                    f"{where}: {name} has shape {list(spec.shape)}, config.json makes it {list(shape)}"
                )

    def _prefix_of(self, missing: list[str]) -> str:
        """What the names of the tensors begin with instead, in words; empty where nothing explains that they are missing."""
        first = missing[0]
        for name in self._files:
            if name.endswith(f".{first}"):
                prefix = name.removesuffix(first)
                return f"; the names begin with {prefix!r} (a wrapper's, of torch.compile or peft): save the model inside it"
        return ""

    def _check_tied(self, output: str, embedding: str) -> None:
        a, b = self.hf_tensor(output), self.hf_tensor(embedding)
        if a.shape != b.shape or not torch.equal(a, b):
            raise ConversionError(
                f"{self.folder}: config.json has tie_word_embeddings true, but {output} differs from {embedding}"
            )

    def hf_tensor(self, name: str, *, whole: bool = True) -> Tensor:
        """A tensor under its Hugging Face name, mapped from its file.

        Args:
            whole: the caller will read all of it.
        """
        return self._files[name].get_tensor(name, whole=whole)

    def specs(self) -> list[TensorSpec]:
        """Every tensor with weights, under its Hugging Face name."""
        left_out = set(self.left_out)
        return [
            f.specs[name]
            for name, f in self._files.items()
            if name not in left_out and not self.family.ignored.search(name)
        ]

    def files(self) -> dict[str, list[TensorSpec]]:
        """The tensors of specs(), by the name of their file."""
        found: dict[str, list[TensorSpec]] = {}
        for spec in self.specs():
            found.setdefault(self._files[spec.name].path.name, []).append(spec)
        return found

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that all Hugging Face tensors of a tensor convert to without loss."""
        if key not in self._dtypes:
            names = [name for rule in self._by_core[key] for name in rule.hf]
            dtypes = {self._files[name].specs[name].dtype for name in names}
            self._dtypes[key] = functools.reduce(torch.promote_types, dtypes)
        return self._dtypes[key]

    def origin(self) -> Origin:
        """The bos, eos and pad ids of config.json, the folder's tokenizer, and the code that it has for transformers."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        ids = {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
        code = config.get("auto_map")
        return Origin(
            str(self.folder),
            ids,
            fingerprint(self.folder),
            self.family.model_type,
            code if isinstance(code, dict) else {},
        )

    def keys(self) -> list[str]:
        """The tensors, under megatron-core's names."""
        return sorted(self._by_core)

    def global_shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, its vocabulary padded for tp 1.

        Raises:
            ConversionError: the family has no such tensor.
        """
        if key not in self._by_core:
            raise ConversionError(f"{self.folder}: {self.family.name} has no {key}")
        first, *others = self._by_core[key]
        return first.shape if first.expert is None else (1 + len(others), *first.shape)

    def full(self, key: str, kind: str = "param", dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor under megatron-core's name, in its own dtype or the one given."""
        assert kind == "param", kind
        first, *others = self._by_core[key]
        if first.expert is None:
            return self.part(first, dtype)
        out = torch.empty(self.global_shape(key), dtype=dtype or self.dtype(key))
        for rule in (first, *others):
            out[rule.expert] = self.part(rule)
        return out

    def part(self, rule: Rule, dtype: torch.dtype | None = None) -> Tensor:
        """What one rule is about: a whole tensor, or one expert's matrix."""
        own = self.dtype(rule.core)
        tensor = rule.to_core(tuple(self.hf_tensor(name).to(own) for name in rule.hf), self.arch)
        return tensor if dtype is None else tensor.to(dtype)

    def rows(self, rule: Rule, first: int, stop: int) -> Tensor:
        """Rows [first, stop) of part(); of the Hugging Face tensors no other rows are read."""
        sources = rule.row_sources(self.arch) if stop - first < rule.shape[0] else None
        if sources is None:
            return self.part(rule)[first:stop]
        sources = sources[first:stop]
        out = torch.zeros(stop - first, *rule.shape[1:], dtype=self.dtype(rule.core))
        begin = 1
        for name, shape in zip(rule.hf, rule.hf_shapes(self.arch), strict=True):
            (places,) = torch.where((sources >= begin) & (sources < begin + shape[0]))
            if len(places):
                found = self.hf_tensor(name, whole=False)
                out[_as_slice(places)] = found[_as_slice(sources[places] - begin)].to(out.dtype)
            begin += shape[0]
        return out

    def check(self, target: Fragment) -> None:
        """Whether `target` can be read: the tensor is there in the model's shape, up to the vocabulary's padding.

        Raises:
            ConversionError: it cannot.
        """
        shape = self.global_shape(target.key)
        rows_fit = shape[0] == target.global_shape[0] or is_vocabulary(target.key)
        if shape[1:] != target.global_shape[1:] or not rows_fit:
            raise ConversionError(f"{self.folder}: {target.key} has shape {shape}, the model's {target.global_shape}")

    def grain(self, target: Fragment) -> int:
        """One replica reads all rows of a tensor; of stacked experts one is read for itself; see WeightSource."""
        return target.numel if self._by_core[target.key][0].expert is None else prod(target.shape[1:])

    def read(self, kind: str, target: Fragment, out: Tensor) -> None:
        """Fill `out`, 1-D, with the elements of `target`; rows beyond the vocabulary become zero.

        Raises:
            ConversionError: the tensor's shape is not the model's.
        """
        self.check(target)
        assert kind == "param", kind
        shape = self.global_shape(target.key)
        if elements_within(target, shape) < target.numel:
            out.zero_()
        for rule in self._by_core[target.key]:
            wanted = _rows_within(fragment_of(rule, shape), target, at=0 if rule.expert is None else 1)
            if wanted is None:
                continue
            if self._last is None or self._last[:2] != (
                rule,
                wanted,
            ):  # a quantized matrix is unpacked whole for any rows
                self._last = (rule, wanted, self.rows(rule, *wanted))
            copy_overlap(fragment_of(rule, shape, wanted), self._last[2].reshape(-1), target, out)


def _rows_within(piece: Fragment, target: Fragment, at: int) -> tuple[int, int] | None:
    """The first and the end of the rows of a piece that the target needs, along dimension `at`; None: it needs none."""
    both = [(low[at], high[at]) for _, _, low, high in overlaps(piece, target)]
    return (min(low for low, _ in both), max(high for _, high in both)) if both else None


def _as_slice(numbers: Tensor) -> slice | Tensor:
    """Ascending numbers as a slice, which needs no copy, if none is left out."""
    first, last = int(numbers[0]), int(numbers[-1])
    consecutive = last - first + 1 == len(numbers) and bool((numbers.diff() == 1).all())
    return slice(first, last + 1) if consecutive else numbers


def fragment_of(rule: Rule, shape: tuple[int, ...], rows: tuple[int, int] | None = None) -> Fragment:
    """The elements that a rule is about.

    Args:
        shape: of megatron-core's whole tensor.
        rows: the first and the end of the rows of the rule's tensor; all without.
    """
    first, stop = rows or (0, rule.shape[0])
    offset, part = (first, *(0,) * (len(rule.shape) - 1)), (stop - first, *rule.shape[1:])
    if rule.expert is not None:
        offset, part = (rule.expert, *offset), (1, *part)
    return Fragment(rule.core, shape, offset, part, 0, prod(part))
