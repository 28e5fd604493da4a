"""A family: rules for its tensors, and the translation between its config.json and ModelArch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flagscale_like.arch import (
    EMBEDDING_NAME,
    OUTPUT_NAME,
    SCALING_FIELDS,
    Experts,
    GatedFeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
    ModelArch,
    MultiLatentAttention,
    Position,
    RopeScaling,
    parameters,
)
from flagscale_like.errors import ConversionError
from flagscale_like.families.quantization import Scheme
from flagscale_like.families.weight_map import QKV, Direct, Exact, GatedMLP, PaddedVocab, RotaryLast, Rule, Shape
from flagscale_like.json_files import BAD_JSON

# The rules of one layer's q, k and v, from megatron-core's prefix, Hugging Face's prefix, and megatron-core's shapes by name.
QKVRules = Callable[[str, str, Mapping[str, Shape]], list[Rule]]


# What not every family with experts has.
EXPERT_FEATURES: dict[str, Callable[[Experts], bool]] = {
    "shared experts": lambda experts: experts.shared_ffn_hidden_size > 0,
    "a gate of the shared experts": lambda experts: experts.shared_gate,
    "sigmoid scores": lambda experts: experts.score == "sigmoid",
    "a bias of the router": lambda experts: experts.bias,
    "groups of experts": lambda experts: experts.groups > 1,
    "scaled weights of experts": lambda experts: experts.scale != 1.0,
    "dense layers": lambda experts: bool(experts.dense_layers),
}


def features(arch: ModelArch) -> set[str]:
    """The parts of the architecture that not every family has.

    Returns:
        names of ModelArch's fields that are on, the kind of the position and of its scaling, and `query_groups` where there
        are fewer KV heads than query heads; and those of EXPERT_FEATURES.
    """
    used = {name for name in ("qkv_bias", "norm_head", "tie_embeddings", "latent_attention") if getattr(arch, name)}
    if arch.qk_norm:
        used.add("qk_norm" if arch.qk_norm_over == "head" else "qk_norm over the projection")
    if arch.experts is not None:
        used.add("experts")
        used |= {name for name, is_on in EXPERT_FEATURES.items() if is_on(arch.experts)}
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


PREFIX = "model."  # of all names but the output layer's in transformers' models with an output layer
# Fields that no config.json has: how weights were drawn, and what the family is called here.
NOT_EXPRESSED = ("family", "init_std", "output_init_std", "norm_init")
# Those of ModelArch.experts: how the load is evened out in training.
EXPERTS_NOT_EXPRESSED = ("balance", "coefficient", "bias_rate", "z_loss")


def expressed(arch: ModelArch) -> dict[str, Any]:
    """What a config.json says of a model: ModelArch's fields that change what it computes.

    Returns:
        values by the name of the field, those of a group under `group.name`.
    """
    values = arch.model_dump(exclude={*NOT_EXPRESSED, "experts"})
    if arch.experts is not None:
        own = arch.experts.model_dump(exclude=set(EXPERTS_NOT_EXPRESSED))
        values |= {f"experts.{name}": value for name, value in own.items()}
        if not arch.experts.dense_layers:
            del values["ffn_hidden_size"]  # of dense layers, of which there are none
    return values


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

    def number(self, key: str, kind: type = int, default: Any = None, *, zero: bool = False) -> Any:
        """A positive number, or with `zero` one that may be 0.

        Raises:
            ConversionError: missing without a default, or something else.
        """
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"has no {key}")
        wanted = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, wanted) or value < 0 or (value == 0 and not zero):
            least = "a positive" if not zero else "0 or a positive"
            raise self.fail(f"{key} is {value!r}, must be {least} {'number' if kind is float else 'integer'}")
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
            raise self.fail(f"{key} is {value!r}, supported: {', '.join(map(repr, allowed)) or 'null'}")

    def rope(self, base: float = 10000.0) -> Position:
        """RoPE from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which replaces both since transformers 5.

        Args:
            base: where neither gives rope_theta.

        Raises:
            ConversionError: a scaling that the native model does not compute.
        """
        parameters: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            found = self.get(key, {})
            if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
                raise self.fail(f"{key} is {found!r}, supported: one set of numbers for all layers")
            parameters |= found
        base = parameters.get("rope_theta") or self.number("rope_theta", float, base)
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


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What a family calls the parts of a mixture of experts, under `model.layers.N.`.

    Attributes:
        block: the module that holds them.
        router: the router's weight, in that module.
        gate_up_down: an expert's three matrices, in `experts.N` of that module.
        shared: the shared FFN, in that module.
        shared_gate: the weight of its gate, in that module.
        bias: the router's bias, in that module.
    """

    block: str = "mlp"
    router: str = "gate"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"
    bias: str = "gate.e_score_correction_bias"


# As transformers 5 holds the models in memory, and writes them with save_original_format=False: each layer's experts are one
# tensor, in the order and orientation of ours.
STACKED_NAMES = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True, kw_only=True)
class Names:
    """How the tensors of a family's layers are called, beside Llama's names.

    Attributes:
        qkv: the rules of one layer's QKV projection.
        experts: of a mixture of experts; None in families without.
        stacked: the experts of a layer are one tensor; see STACKED_NAMES.
    """

    qkv: QKVRules
    experts: ExpertNames | None = None
    stacked: bool = False


def decoder_rules(arch: ModelArch, names: Names) -> list[Rule]:
    """The rules of a pre-norm decoder with Llama's tensor names, in the order of the layers."""
    shapes = {parameter.name: parameter.padded_shape() for parameter in parameters(arch)}

    def rule(kind: type[Direct], core: str, *hf: str) -> Rule:
        return kind(core, shapes[core], hf)

    rules = [rule(PaddedVocab, EMBEDDING_NAME, "model.embed_tokens.weight")]
    for i, layer in enumerate(arch.layers):
        core, hf = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention, feed_forward = layer.attention, layer.feed_forward
        rules += [
            rule(Direct, core + "input_layernorm.weight", hf + "input_layernorm.weight"),
            *ATTENTION_RULES[type(attention)](attention, core, hf, shapes, names),
            rule(Direct, core + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight"),
            *FEED_FORWARD_RULES[type(feed_forward)](feed_forward, core, hf, shapes, names),
        ]
    rules.append(rule(Direct, "decoder.final_layernorm.weight", "model.norm.weight"))
    if not arch.tie_embeddings:
        rules.append(rule(PaddedVocab, OUTPUT_NAME, "lm_head.weight"))
    return rules


def attention_rules(
    block: GroupedQueryAttention, core: str, hf: str, shapes: Mapping[str, Shape], names: Names
) -> list[Rule]:
    """The QKV projection as the family stores it, and the output projection."""
    out = core + "self_attention.linear_proj.weight"
    return [
        *names.qkv(core + "self_attention.", hf + "self_attn.", shapes),
        Direct(out, shapes[out], (hf + "self_attn.o_proj.weight",)),
    ]


def latent_attention_rules(
    block: MultiLatentAttention, core: str, hf: str, shapes: Mapping[str, Shape], names: Names
) -> list[Rule]:
    """DeepSeek's projections down to the latent vectors and up to the heads."""
    core, hf, latent = core + "self_attention.", hf + "self_attn.", block.latent
    own = {
        "linear_q_proj": "q_proj",
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    rotary = {"linear_q_proj": (block.heads, 0), "linear_q_up_proj": (block.heads, 0)}
    rotary["linear_kv_down_proj"] = (1, latent.kv_lora_rank)
    rules: list[Rule] = []
    for ours, theirs in own.items():
        name, found = f"{core}{ours}.weight", (f"{hf}{theirs}.weight",)
        if name not in shapes:
            continue
        if ours in rotary:
            heads, before = rotary[ours]
            size = latent.qk_rope_head_dim
            rules.append(RotaryLast(name, shapes[name], found, heads=heads, rotary=size, latent=before))
        else:
            rules.append(Direct(name, shapes[name], found))
    return rules


def gated_feed_forward_rules(
    block: GatedFeedForward, core: str, hf: str, shapes: Mapping[str, Shape], names: Names
) -> list[Rule]:
    """Gate, up and down."""
    return _gated(core + "mlp.", hf + "mlp.", shapes)


def _gated(core: str, hf: str, shapes: Mapping[str, Shape]) -> list[Rule]:
    gate_up, down = core + "linear_fc1.weight", core + "linear_fc2.weight"
    return [
        GatedMLP(gate_up, shapes[gate_up], (hf + "gate_proj.weight", hf + "up_proj.weight")),
        Direct(down, shapes[down], (hf + "down_proj.weight",)),
    ]


def expert_rules(block: MixtureOfExperts, core: str, hf: str, shapes: Mapping[str, Shape], names: Names) -> list[Rule]:
    """The router, each expert's gate, up and down, and the shared FFN."""
    own = names.experts
    assert own is not None, "the family has no experts"
    core, at = core + "mlp.", f"{hf}{'mlp' if names.stacked else own.block}."
    router, bias = core + "router.weight", core + "router.expert_bias"
    rules: list[Rule] = [Direct(router, shapes[router], (f"{at}{own.router}.weight",))]
    if bias in shapes:
        rules.append(Exact(bias, shapes[bias], (at + own.bias,)))
    gate_up, down = core + "experts.linear_fc1.weight", core + "experts.linear_fc2.weight"
    if names.stacked:
        stacked = zip((gate_up, down), STACKED_NAMES, strict=True)
        rules += [Direct(name, shapes[name], (hf + theirs,)) for name, theirs in stacked]
    else:
        every = [[f"{at}experts.{i}.{name}.weight" for name in own.gate_up_down] for i in range(block.experts.count)]
        rules += [GatedMLP(gate_up, shapes[gate_up][1:], (g, u), i) for i, (g, u, _) in enumerate(every)]
        rules += [Direct(down, shapes[down][1:], (d,), i) for i, (_, _, d) in enumerate(every)]
    gate = core + "shared_experts.gate_weight"
    if gate in shapes:
        rules.append(Direct(gate, shapes[gate], (f"{at}{own.shared_gate}.weight",)))
    if block.experts.shared_ffn_hidden_size:
        rules += _gated(core + "shared_experts.", f"{at}{own.shared}.", shapes)
    return rules


# The rules of each class of block in flagscale_like.arch.
ATTENTION_RULES = {GroupedQueryAttention: attention_rules, MultiLatentAttention: latent_attention_rules}
FEED_FORWARD_RULES = {GatedFeedForward: gated_feed_forward_rules, MixtureOfExperts: expert_rules}


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


def without_prefix(rule: Rule) -> Rule:
    """A rule for the names of transformers' models without an output layer, which do not begin with `model.`."""
    return replace(rule, hf=tuple(name.removeprefix(PREFIX) for name in rule.hf))


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
