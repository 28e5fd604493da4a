"""An embedding model that is only run: texts in, vectors out, on any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from flagscale_like.checkpoint.sentence_transformers import is_sentence_transformers, read_text_settings
from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.data.batch import Batch, collate
from flagscale_like.data.group_source import pack_texts
from flagscale_like.data.groups import groups_at
from flagscale_like.data.texts import TextEncoder
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError, ConfigError, DataError
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.embedding import Pooling, TextVectors
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.training.row_plan import RowPlan

Side = Literal["query", "passage"]

BLOCK = 1024  # texts that are encoded, packed and gathered at a time
MAX_PLACES = 512  # of a row, where nobody says more and no text is longer

# The side of a prompt of sentence-transformers, by its name.
SIDES: dict[str, Side] = {"query": "query", "document": "passage", "passage": "passage"}


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

    @property
    def longest(self) -> int:
        """Most tokens of a text of any side; MAX_PLACES or more where a side has no limit."""
        limits = list(self.lengths.values())
        return max(limits) if len(limits) == 2 else max(MAX_PLACES, *limits, 0)


def settings_of(source: WeightSource) -> EmbedderSettings:
    """What a model's folder says: a sentence-transformers folder, or a run's configuration and its sources.

    Of a run whose sources have different instructions, none is taken.

    Raises:
        ConversionError: a sentence-transformers folder does something that this system does not.
    """
    if is_sentence_transformers(source.folder):
        return _of_folder(source.folder)
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


def _of_folder(folder: Path) -> EmbedderSettings:
    found = read_text_settings(folder)
    instructions = {SIDES[name]: text for name, text in found.prompts.items() if name in SIDES}
    lengths: dict[Side, int] = {"query": found.max_tokens, "passage": found.max_tokens} if found.max_tokens else {}
    return EmbedderSettings(found.pooling, instructions, lengths, str(folder))


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
        self.settings, self.ctx, self.texts, self.folder = settings, ctx, TextEncoder(tokenizer), source.folder
        if self.texts.tokenizer.vocab_size > source.arch.vocab_size:
            raise DataError(
                f"tokenizer {tokenizer} has {self.texts.tokenizer.vocab_size} ids, the model's vocabulary has "
                f"{source.arch.vocab_size}: use its tokenizer"
            )
        longest, limit = settings.longest, source.arch.longest_sequence
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
        plan = RowPlan.of([len(one.ids) for one in found], self.spec, self.ctx.dp)

        def batches() -> Iterator[Batch]:
            for packs in plan.micro_batches(self.ctx.dp_rank):
                made = [pack_texts([found[n].ids for n in pack], self.spec.seq_length, pad=0) for pack in packs]
                yield Batch.of(collate(made), self.ctx.platform.device)

        with self.engine.evaluation():
            vectors = self.engine.vectors(batches(), self.objective, plan.count)
        gives = vectors is not None and self.ctx.tp_rank == 0 and self.ctx.cp_rank == 0
        gathered = self.ctx.gather_to_main((self.ctx.dp_rank, vectors.cpu().numpy()) if gives else None)
        if not self.ctx.is_main:
            return None
        result = np.empty((len(texts), self.size), dtype=np.float32)  # every text is in a row of some rank
        for dp_rank, own in (entry for entry in gathered if entry is not None):
            result[plan.order(dp_rank)] = own
        if not np.isfinite(result).all():
            raise CheckpointError(
                f"{self.folder}: gives vectors that are not finite: its weights or --precision are at fault"
            )
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
