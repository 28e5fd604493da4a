"""An embedding model that is only run: texts in, vectors out, on any layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.best_fit import best_fit_decreasing
from flagscale_like.data.group_source import pack_texts
from flagscale_like.data.groups import groups_at
from flagscale_like.data.texts import TextEncoder
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError, ConversionError, DataError
from flagscale_like.json_files import BAD_JSON
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.embedding import Pooling, TextVectors
from flagscale_like.runtime.parallel import ParallelContext

Side = Literal["query", "passage"]

BLOCK = 1024  # texts that are encoded, packed and gathered at a time
MAX_PLACES = 512  # of a row, where nobody says more and no text is longer

# sentence-transformers' names of a pooling, in 1_Pooling/config.json.
POOLING_MODES: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
}
POOLING_NAMES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "first"}
PROMPTS: dict[str, Side] = {"query": "query", "document": "passage", "passage": "passage"}


@dataclass(frozen=True)
class Text:
    """A text to encode, and what is put before it; None: what the model's settings say."""

    text: str
    instruction: str | None = None


@dataclass(frozen=True)
class EmbedderSettings:
    """How a model embeds texts.

    Attributes:
        pooling: see config.Contrastive; None: unknown.
        instructions: what is put before a text of each side; a side that is missing is unknown.
        lengths: most tokens of a text of each side; a side that is missing has no limit.
        origin: where the settings come from, in words.
    """

    pooling: Pooling | None = None
    instructions: dict[Side, str] = field(default_factory=dict)
    lengths: dict[Side, int] = field(default_factory=dict)
    origin: str = "the options"


def settings_of(source: WeightSource) -> EmbedderSettings:
    """What a model's folder says: a sentence-transformers folder, or a run's configuration and its sources.

    Of a run whose sources have different instructions, none is taken.

    Raises:
        ConversionError: a sentence-transformers folder does something that this system does not.
    """
    if (source.folder / "modules.json").is_file():
        return _sentence_transformers(source.folder)
    state = getattr(source, "state", None) or getattr(getattr(source, "adapters", None), "state", None) or {}
    objective = state.get("config", {}).get("objective", {})
    if objective.get("kind") != "contrastive":
        return EmbedderSettings()
    found = [groups_at(entry["path"]) for entry in state["config"].get("data", {}).get("sources") or []]
    groups = [one for one in found if one is not None]
    instructions, lengths = {}, {}
    for side in ("query", "passage"):
        texts = {getattr(one, f"{side}_instruction") for one in groups}
        limits = {getattr(one, f"{side}_length") for one in groups}
        if len(texts) == 1:
            instructions[side] = texts.pop()
        if limits and None not in limits:
            lengths[side] = max(limits)
    return EmbedderSettings(objective.get("pooling", "last"), instructions, lengths, f"the run of {source.folder}")


def _sentence_transformers(folder: Path) -> EmbedderSettings:
    modules = _read(folder / "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConversionError(
            f"{folder / 'modules.json'}: has {', '.join(kinds)}: supported: Transformer, Pooling, Normalize"
        )
    pooling = _read(folder / modules[1]["path"] / "config.json")
    modes = [mode for name, mode in POOLING_MODES.items() if pooling.get(name)]
    if not modes and pooling.get("pooling_mode") in POOLING_NAMES:
        modes = [POOLING_NAMES[pooling["pooling_mode"]]]
    others = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or set(others) - set(POOLING_MODES):
        raise ConversionError(
            f"{folder}: pools by {others or pooling.get('pooling_mode')}: supported: last, mean or first"
        )
    path = folder / "config_sentence_transformers.json"
    prompts = (_read(path).get("prompts") or {}) if path.is_file() else {}
    instructions = {PROMPTS[name]: text for name, text in prompts.items() if name in PROMPTS}
    path = folder / modules[0].get("path", "") / "sentence_bert_config.json"
    limit = _read(path).get("max_seq_length") if path.is_file() else None
    lengths = {"query": int(limit), "passage": int(limit)} if limit else {}
    return EmbedderSettings(modes[0], instructions, lengths, str(folder))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *BAD_JSON) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from None


class Embedder:
    """Turns texts into vectors. All ranks of a layout make one and call it alike; rank 0 gets the vectors.

    Args:
        source: the weights; with adapters (AdaptedWeights), these take part.
        tokenizer: the tokenizer's folder.
        settings: see settings_of().
        max_tokens: most tokens of a text, and the places of a row; 0 takes the longest of the settings' limits.

    Raises:
        ConfigError: the pooling is unknown, or the layout or max_tokens do not fit the model.
        DataError: the tokenizer has more ids than the model.
    """

    def __init__(
        self,
        source: WeightSource,
        tokenizer: Path,
        ctx: ParallelContext,
        settings: EmbedderSettings,
        *,
        max_tokens: int = 0,
        micro_batch_size: int = 1,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        if settings.pooling is None:
            raise ConfigError(f"{source.folder}: does not say how it pools: give --pooling last, mean or first")
        self.settings, self.ctx, self.texts = settings, ctx, TextEncoder(tokenizer)
        if self.texts.tokenizer.vocab_size > source.arch.vocab_size:
            raise DataError(
                f"tokenizer {tokenizer} has {self.texts.tokenizer.vocab_size} ids, the model's vocabulary has "
                f"{source.arch.vocab_size}: use its tokenizer"
            )
        longest = max(settings.lengths.values(), default=0) or MAX_PLACES
        limit = source.arch.longest_sequence
        self.places = max_tokens or (min(longest, limit) if limit else longest)
        if limit and self.places > limit:
            raise ConfigError(f"the model takes at most {limit} tokens, --max-tokens is {self.places}: give {limit}")
        multiple = ctx.layout.tp if ctx.layout.sp else 1  # sequence parallelism divides rows
        self.spec = ModelSpec(
            arch=source.arch,
            head="hidden",
            parallel=ctx.layout,
            precision=precision,
            seq_length=-(-self.places // multiple) * multiple,
            micro_batch_size=micro_batch_size,
            lora=getattr(source, "lora", None),
        )
        self.engine = Engine.build(self.spec, ctx, source=source)
        self.objective, self.cut = TextVectors(settings.pooling), 0

    @property
    def size(self) -> int:
        """Numbers of a vector."""
        return self.spec.arch.hidden_size

    def limit(self, side: Side) -> int:
        """Most tokens of a text of a side."""
        return min(self.settings.lengths.get(side, self.places), self.places)

    def encode(self, texts: Sequence[Text], side: Side) -> np.ndarray | None:
        """Vectors of some texts, of length 1, without white space at their ends. What is cut is counted in `self.cut`.

        Args:
            side: whose instruction is put before those that have none of their own.

        Returns:
            On rank 0, float32 [n, size]; None on the others.
        """
        default = self.settings.instructions.get(side, "")
        whole = [(default if one.instruction is None else one.instruction) + one.text.strip() for one in texts]
        found = self.texts.encode(whole, self.limit(side))
        self.cut += sum(one.cut for one in found)
        rows = best_fit_decreasing([len(one.ids) for one in found], self.spec.seq_length)
        step, size = self.spec.parallel.pp if self.spec.parallel.vpp > 1 else 1, self.spec.micro_batch_size
        count = -(-len(rows) // (size * self.ctx.dp * step)) * step

        def numbers(dp_rank: int) -> list[int]:
            """The rows of a data-parallel rank; they start again after the last, to fill the last micro-batches."""
            firsts = ((turn * self.ctx.dp + dp_rank) * size for turn in range(count))
            return [number % len(rows) for first in firsts for number in range(first, first + size)]

        def batches() -> Iterator[Batch]:
            own = numbers(self.ctx.dp_rank)
            for start in range(0, len(own), size):
                packs = [[found[n].ids for n in rows[number]] for number in own[start : start + size]]
                made = [pack_texts(pack, self.spec.seq_length, pad=0) for pack in packs]
                yield Batch.of(collate(made), self.ctx.platform.device)

        with self.engine.evaluation():
            vectors = self.engine.vectors(batches(), self.objective, count)
        gives = vectors is not None and self.ctx.tp_rank == 0 and self.ctx.cp_rank == 0
        gathered = self.ctx.gather_to_main((self.ctx.dp_rank, vectors.cpu().numpy()) if gives else None)
        if not self.ctx.is_main:
            return None
        result = np.empty((len(texts), self.size), dtype=np.float32)
        for dp_rank, own in (entry for entry in gathered if entry is not None):
            result[[n for number in numbers(dp_rank) for n in rows[number]]] = own
        return result


def with_options(
    settings: EmbedderSettings,
    *,
    pooling: Pooling | None = None,
    instructions: dict[Side, str | None] | None = None,
    max_tokens: int | None = None,
) -> EmbedderSettings:
    """The settings with the user's options in their places; None leaves what is there."""
    given = {side: text for side, text in (instructions or {}).items() if text is not None}
    limits = {"query": max_tokens, "passage": max_tokens} if max_tokens else settings.lengths
    return replace(
        settings,
        pooling=pooling or settings.pooling,
        instructions=settings.instructions | given,
        lengths=limits,
    )


def shortened(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` numbers of each vector, scaled to length 1 again (Matryoshka representation learning)."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    part = torch.from_numpy(vectors[:, :dimensions].copy())
    return torch.nn.functional.normalize(part, dim=-1).numpy()
