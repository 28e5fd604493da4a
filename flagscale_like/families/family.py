"""A family: rules for its tensors, and the translation between its config.json and ModelArch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flagscale_like.arch import (
    EMBEDDING_NAME,
    OUTPUT_NAME,
    SCALING_FIELDS,
    GatedFeedForward,
    GroupedQueryAttention,
    ModelArch,
    Position,
    RopeScaling,
    parameters,
)
from flagscale_like.errors import ConversionError
from flagscale_like.families.quantization import Scheme
from flagscale_like.families.weight_map import QKV, Direct, GatedMLP, PaddedVocab, Rule, Shape
from flagscale_like.json_files import BAD_JSON

# The rules of one layer's q, k and v, from megatron-core's prefix, Hugging Face's prefix, and megatron-core's shapes by name.
QKVRules = Callable[[str, str, Mapping[str, Shape]], list[Rule]]


def features(arch: ModelArch) -> set[str]:
    """The parts of the architecture that not every family has.

    Returns:
        names of ModelArch's fields that are on, the kind of the position and of its scaling, and `query_groups` where there
        are fewer KV heads than query heads.
    """
    used = {name for name in ("qkv_bias", "qk_norm", "norm_head", "tie_embeddings") if getattr(arch, name)}
    used.add(arch.position.kind)
    if arch.position.scaling is not None:
        used.add(f"{arch.position.scaling.kind} RoPE scaling")
    if arch.sliding_window is not None:
        used.add("sliding_window")
    if arch.attention == "bidirectional":
        used.add("bidirectional attention")
    if arch.num_query_groups != arch.num_attention_heads:
        used.add("query_groups")
    return used


# Fields that no config.json has: how weights were drawn, and what the family is called here.
NOT_EXPRESSED = ("family", "init_std", "output_init_std", "norm_init")
# The features of a family whose code takes RoPE's parameters from transformers.
SCALINGS = frozenset(f"{kind} RoPE scaling" for kind in SCALING_FIELDS)


class Settings:
    """The values of a config.json. A missing key or one of another type is an error that names the file.

    Args:
        source: the file's name in messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """config.json of a Hugging Face folder.

        Raises:
            ConversionError: it is missing or is no JSON object.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConversionError(
                f"{folder}: not a Hugging Face folder: config.json: {error.strerror or error}"
            ) from None
        except BAD_JSON as error:
            raise ConversionError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConversionError(f"{path}: must be a JSON object, found {type(values).__name__}")
        return cls(values, str(path))

    def fail(self, message: str) -> ConversionError:
        return ConversionError(f"{self.source}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, kind: type = int, default: Any = None) -> Any:
        """A positive number.

        Raises:
            ConversionError: missing without a default, or something else.
        """
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"has no {key}")
        wanted = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, wanted) or value <= 0:
            raise self.fail(f"{key} is {value!r}, must be a positive {'number' if kind is float else 'integer'}")
        return kind(value)

    def names(self, key: str) -> list[str]:
        """A list of names; empty where the key is missing or null.

        Raises:
            ConversionError: something else.
        """
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.fail(f"{key} is {value!r}, must be a list of names")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Check that a key is missing, null or has one of the allowed values.

        Raises:
            ConversionError: it has another value, which the native model does not compute.
        """
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.fail(f"{key} is {value!r}, supported: {', '.join(map(repr, allowed))}")

    def rope(self) -> Position:
        """RoPE from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which replaces both since transformers 5.

        Raises:
            ConversionError: a scaling that the native model does not compute.
        """
        parameters: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            found = self.get(key, {})
            if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
                raise self.fail(f"{key} is {found!r}, supported: one set of numbers for all layers")
            parameters |= found
        base = parameters.get("rope_theta") or self.number("rope_theta", float, 10000.0)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        partial = parameters.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise self.fail(f"partial_rotary_factor is {partial!r}, supported: 1.0")
        scaling = None if kind == "default" else self._scaling(kind, parameters)
        try:
            return Position(base=base, scaling=scaling)
        except ValidationError as error:
            raise self.fail(f"rope_theta: {_first_message(error)}") from None

    def _scaling(self, kind: str, parameters: dict[str, Any]) -> RopeScaling | None:
        """What is missing has the defaults of transformers' modeling_rope_utils."""
        if kind not in tuple(SCALING_FIELDS):
            raise self.fail(f"rope_scaling is {kind!r}, supported: {', '.join(SCALING_FIELDS)}")
        given = {name: parameters[name] for name in SCALING_FIELDS[kind] if parameters.get(name) is not None}
        if kind != "linear":
            before = self.get("original_max_position_embeddings", parameters.get("original_max_position_embeddings"))
            if before is None and kind != "llama3":
                before = self.number("max_position_embeddings")
            if before is not None:
                given["original_max_position_embeddings"] = before
            if kind == "dynamic" and before != self.number("max_position_embeddings"):
                raise self.fail(
                    f"rope_scaling of type dynamic has original_max_position_embeddings {before}, for which transformers "
                    f"takes max_position_embeddings ({self.get('max_position_embeddings')}): let them be equal"
                )
        if kind == "yarn":
            if "factor" not in given and isinstance(before, int) and before > 0:
                given["factor"] = self.number("max_position_embeddings") / before
            given = {k: v for k, v in given.items() if v != 0 or k not in ("beta_fast", "beta_slow")}
            given["truncate"] = bool(parameters.get("truncate", True))
        required = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        missing = [name for name in required if name in SCALING_FIELDS[kind] and name not in given]
        if missing:
            raise self.fail(f"rope_scaling of type {kind} has no {', '.join(sorted(missing))}")
        try:
            scaling = RopeScaling(kind=kind, **given)
        except ValidationError as error:
            raise self.fail(f"rope_scaling: {_first_message(error)}") from None
        return None if kind == "linear" and scaling.factor == 1 else scaling

    def arch(self, family: str, **more: Any) -> ModelArch:
        """ModelArch from the keys that all families share, and the fields in `more`.

        Raises:
            ConversionError: a key is missing, or the numbers do not fit each other.
        """
        self.require("hidden_act", "silu", "swish")
        Scheme.of(self)
        values: dict[str, Any] = {
            "num_layers": self.number("num_hidden_layers"),
            "hidden_size": self.number("hidden_size"),
            "num_attention_heads": self.number("num_attention_heads"),
            "ffn_hidden_size": self.number("intermediate_size"),
            "vocab_size": self.number("vocab_size"),
            "norm_eps": self.number("rms_norm_eps", float),
            "init_std": self.number("initializer_range", float, 0.02),
            "tie_embeddings": bool(self.get("tie_word_embeddings", False)),
            "max_position_embeddings": self.number(
                "max_position_embeddings", default=self.get("model_max_length", 2048)
            ),
            "family": family,
        }
        if self.get("num_key_value_heads") is not None:
            values["num_query_groups"] = self.number("num_key_value_heads")
        if self.get("is_causal", True) is False:
            values["attention"] = "bidirectional"
        if self.get("head_dim") is not None:
            values["head_dim"] = self.number("head_dim")
        try:
            return ModelArch.model_validate(values | more)
        except ValidationError as error:
            raise self.fail(_first_message(error)) from None


def _first_message(error: ValidationError) -> str:
    item = error.errors()[0]
    where = ".".join(map(str, item["loc"]))
    return (f"{where}: " if where else "") + item["msg"].removeprefix("Value error, ")


def common_config(arch: ModelArch) -> dict[str, Any]:
    """The keys of config.json that are the same in all families.

    transformers 5 computes bidirectional attention where is_causal is false; earlier versions do not read it.
    """
    return {
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "vocab_size": arch.vocab_size,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "hidden_act": "silu",
        "initializer_range": arch.init_std,
        "use_cache": True,
        **({"is_causal": False} if arch.attention == "bidirectional" else {}),
    }


def rope_config(arch: ModelArch, *, type_key: str = "rope_type") -> dict[str, Any]:
    """RoPE's keys of config.json: those of transformers 5 (rope_parameters), and those of transformers 4 and others.

    Args:
        type_key: the name of the kind in `rope_scaling`.

    Raises:
        ConversionError: dynamic scaling starts at another length than max_position_embeddings.
    """
    scaling = arch.position.scaling
    kind = scaling.kind if scaling else "default"
    length, numbers = arch.max_position_embeddings or 2048, {}
    if scaling is not None:
        fields = RopeScaling.model_fields
        optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
        numbers = {k: v for k, v in scaling.numbers.items() if k not in optional or v != fields[k].default}
        before = numbers.get("original_max_position_embeddings")
        if before and not arch.max_position_embeddings:
            length = before if kind == "dynamic" else round(before * scaling.factor)
        if kind == "dynamic" and length != numbers.pop("original_max_position_embeddings"):
            raise ConversionError(
                f"model.position.scaling is dynamic from original_max_position_embeddings ({before}) on, which a config.json "
                f"takes from max_position_embeddings ({length}): set model.max_position_embeddings to {before}"
            )
    return {
        "max_position_embeddings": length,
        "rope_theta": arch.position.base,
        "rope_scaling": {type_key: kind, **numbers} if scaling else None,
        "rope_parameters": {"rope_type": kind, "rope_theta": arch.position.base, **numbers},
    }


def decoder_rules(arch: ModelArch, qkv: QKVRules) -> list[Rule]:
    """The rules of a pre-norm decoder with Llama's tensor names, in the order of the layers.

    Args:
        qkv: the rules of one layer's QKV projection.
    """
    shapes = {parameter.name: parameter.padded_shape() for parameter in parameters(arch)}

    def rule(kind: type[Direct], core: str, *hf: str) -> Rule:
        return kind(core, shapes[core], hf)

    rules = [rule(PaddedVocab, EMBEDDING_NAME, "model.embed_tokens.weight")]
    for i, layer in enumerate(arch.layers):
        core, hf = f"decoder.layers.{i}.", f"model.layers.{i}."
        rules += [
            rule(Direct, core + "input_layernorm.weight", hf + "input_layernorm.weight"),
            *ATTENTION_RULES[type(layer.attention)](core, hf, shapes, qkv),
            rule(Direct, core + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight"),
            *FEED_FORWARD_RULES[type(layer.feed_forward)](core, hf, shapes),
        ]
    rules.append(rule(Direct, "decoder.final_layernorm.weight", "model.norm.weight"))
    if not arch.tie_embeddings:
        rules.append(rule(PaddedVocab, OUTPUT_NAME, "lm_head.weight"))
    return rules


def attention_rules(core: str, hf: str, shapes: Mapping[str, Shape], qkv: QKVRules) -> list[Rule]:
    """The QKV projection as the family stores it, and the output projection."""
    out = core + "self_attention.linear_proj.weight"
    return [
        *qkv(core + "self_attention.", hf + "self_attn.", shapes),
        Direct(out, shapes[out], (hf + "self_attn.o_proj.weight",)),
    ]


def gated_feed_forward_rules(core: str, hf: str, shapes: Mapping[str, Shape]) -> list[Rule]:
    """Gate, up and down."""
    gate_up, down = core + "mlp.linear_fc1.weight", core + "mlp.linear_fc2.weight"
    return [
        GatedMLP(gate_up, shapes[gate_up], (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight")),
        Direct(down, shapes[down], (hf + "mlp.down_proj.weight",)),
    ]


# The rules of each class of block in flagscale_like.arch.
ATTENTION_RULES = {GroupedQueryAttention: attention_rules}
FEED_FORWARD_RULES = {GatedFeedForward: gated_feed_forward_rules}


def split_qkv(core: str, hf: str, shapes: Mapping[str, Shape]) -> list[Rule]:
    """q_proj, k_proj, v_proj; their biases, and the norms of q and k, where the architecture has them."""
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        name = f"{core}linear_qkv.{kind}"
        if name in shapes:
            rules.append(QKV(name, shapes[name], tuple(f"{hf}{x}_proj.{kind}" for x in "qkv")))
    for x in "qk":
        name = f"{core}{x}_layernorm.weight"
        if name in shapes:
            rules.append(Direct(name, shapes[name], (f"{hf}{x}_norm.weight",)))
    return rules


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
    ignored: re.Pattern[str] = field(default=re.compile(r"\.rotary_emb\.inv_freq$"))

    def rules(self, arch: ModelArch) -> list[Rule]:
        """The rules of all tensors of the model, in the order of the layers."""
        return decoder_rules(arch, self.qkv)

    def rules_with_head(self, arch: ModelArch, value_heads: int) -> list[Rule]:
        """rules() of a model whose value head has so many outputs; of a language model, with 0."""
        rules = self.rules(arch)
        if not value_heads:
            return rules
        head = Direct(OUTPUT_NAME, (value_heads, arch.hidden_size), ("score.weight",))
        return [*(rule for rule in rules if rule.core != OUTPUT_NAME), head]

    def config_with_head(self, arch: ModelArch, value_heads: int) -> dict[str, Any]:
        """hf_config() of a model whose value head has so many outputs; of a language model, with 0.

        Raises:
            ConversionError: see hf_config(), or there is no class for models with a value head.
        """
        config = self.hf_config(arch)
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
        own, found = (a.model_dump() for a in (arch, self.read(Settings(values, f"config.json of {self.name}"))))
        free = {*NOT_EXPRESSED, *(() if arch.max_position_embeddings else ("max_position_embeddings",))}
        lost = [
            f"model.{key} {own[key]!r} as {found[key]!r}" for key in own if key not in free and own[key] != found[key]
        ]
        if lost:
            raise ConversionError(
                f"{self.name} cannot express the model: its config.json would be read with {', '.join(lost)}; choose another "
                "family with --as or model.family"
            )
