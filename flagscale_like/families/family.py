"""A family: rules for its tensors, and the translation between its config.json and ModelArch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flagscale_like.arch import OUTPUT_NAME, ModelArch
from flagscale_like.errors import ConversionError
from flagscale_like.families.features import expressed, features
from flagscale_like.families.rules import (
    ExpertNames,
    Names,
    QKVRules,
    decoder_rules,
    split_qkv,
    without_prefix,
)
from flagscale_like.families.settings import Settings
from flagscale_like.families.weight_map import Direct, Rule


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        name: ModelArch.family.
        model_type: of config.json.
        architectures: class names; the first is the one written.
        classifier: class name of transformers' models with scores for a sequence, as which reward models are written; None
            where there is none.
        supports: the `features` that its published code can compute.
        needs: the `features` that its published code always computes.
        matches: whether a config.json is of this family, for families that share a model_type.
        read: config.json -> ModelArch.
        write: ModelArch -> config.json, without `architectures` and `model_type`.
        qkv: the rules of its QKV projection.
        experts: what it calls the parts of a mixture of experts; None where it has none.
        ignored: names of tensors in Hugging Face folders that are no weights.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    supports: frozenset[str]
    read: Callable[[Settings], ModelArch]
    write: Callable[[ModelArch], dict[str, Any]]
    needs: frozenset[str] = frozenset()
    matches: Callable[[Settings], bool] = lambda _: True
    classifier: str | None = None
    qkv: QKVRules = split_qkv
    experts: ExpertNames | None = None
    ignored: re.Pattern[str] = field(default=re.compile(r"\.rotary_emb\.inv_freq$"))

    def rules(self, arch: ModelArch, *, stacked: bool = False) -> list[Rule]:
        """The rules of all tensors of the model, in the order of the layers.

        Args:
            stacked: of a folder in which each layer's experts are one tensor; see STACKED_NAMES. No export is written so.
        """
        return decoder_rules(arch, Names(qkv=self.qkv, experts=self.experts, stacked=stacked))

    @property
    def encoder(self) -> str | None:
        """Class name of transformers' model without an output layer, as which embedding models are written.

        None: transformers ships none.
        """
        name, suffix = self.architectures[0], "ForCausalLM"
        return name.removesuffix(suffix) + "Model" if self.classifier and name.endswith(suffix) else None

    def rules_with_head(
        self, arch: ModelArch, value_heads: int, *, embedder: bool = False, stacked: bool = False
    ) -> list[Rule]:
        """rules() of a model whose value head has so many outputs; of a language model, with 0.

        Args:
            embedder: an embedding model, which has no output layer. Its names are those of transformers' class `encoder`.
            stacked: see rules().
        """
        rules = self.rules(arch, stacked=stacked) if stacked else self.rules(arch)
        if embedder:
            return [without_prefix(rule) for rule in rules if rule.core != OUTPUT_NAME]
        if not value_heads:
            return rules
        head = Direct(OUTPUT_NAME, (value_heads, arch.hidden_size), ("score.weight",))
        return [*(rule for rule in rules if rule.core != OUTPUT_NAME), head]

    def config_with_head(self, arch: ModelArch, value_heads: int, *, embedder: bool = False) -> dict[str, Any]:
        """hf_config() of a model whose value head has so many outputs; of a language model, with 0.

        Args:
            embedder: an embedding model, which has no output layer.

        Raises:
            ConversionError: see hf_config(), or there is no class for models with a value head or without an output layer.
        """
        config = self.hf_config(arch)
        if embedder and self.encoder is None:
            raise ConversionError(
                f"an embedding model cannot be written as {self.name}: transformers has no such class without an output "
                "layer; choose another family with --as or model.family"
            )
        if embedder:
            return config | {"architectures": [self.encoder]}
        if not value_heads:
            return config
        if self.classifier is None:
            raise ConversionError(
                f"a reward model cannot be written as {self.name}: transformers has no class with scores for it; choose "
                "another family with --as or model.family"
            )
        labels = [f"reward {number}" for number in range(value_heads)]
        named = {"id2label": {str(i): label for i, label in enumerate(labels)}}
        return config | {"architectures": [self.classifier], **named, "label2id": {v: i for i, v in enumerate(labels)}}

    def is_embedder(self, settings: Settings) -> bool:
        """Whether a Hugging Face folder's model has no output layer."""
        return self.encoder is not None and self.encoder in settings.names("architectures")

    def value_heads(self, settings: Settings) -> int:
        """Outputs of the value head of a Hugging Face folder's model; 0 for a language model."""
        if self.classifier is None or self.classifier not in settings.names("architectures"):
            return 0
        labels = settings.get("id2label")
        return len(labels) if isinstance(labels, dict) and labels else settings.number("num_labels", default=2)

    def hf_config(self, arch: ModelArch) -> dict[str, Any]:
        """config.json.

        Raises:
            ConversionError: the architecture does something that this family does not.
        """
        unsupported, missing = features(arch) - self.supports, self.needs - features(arch)
        if missing:
            raise ConversionError(
                f"a model without {', '.join(sorted(missing))} cannot be written as {self.name}, which always has it; choose "
                f"another family with --as or model.family"
            )
        if unsupported:
            raise ConversionError(
                f"a model with {', '.join(sorted(unsupported))} cannot be written as {self.name}, which has no such "
                f"part; choose another family with --as or model.family"
            )
        values = {"architectures": [self.architectures[0]], "model_type": self.model_type, **self.write(arch)}
        self._check_written(arch, values)
        return values

    def _check_written(self, arch: ModelArch, values: dict[str, Any]) -> None:
        """Read what was written. A field that comes back as another one would be another model's.

        Raises:
            ConversionError: a field of the architecture that config.json does not express.
        """
        own, found = map(expressed, (arch, self.read(Settings(values, f"config.json of {self.name}"))))
        if not arch.max_position_embeddings:
            del own["max_position_embeddings"]
        lost = [f"model.{key} {own[key]!r} as {found.get(key)!r}" for key in own if own[key] != found.get(key)]
        if lost:
            raise ConversionError(
                f"{self.name} cannot express the model: its config.json would be read with {', '.join(lost)}; choose another "
                "family with --as or model.family"
            )
