"""The weight map's rules of a decoder: one function for each class of block, with the names of a family's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flagscale_like.arch import (
    EMBEDDING_NAME,
    OUTPUT_NAME,
    Block,
    GatedFeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
    ModelArch,
    MultiLatentAttention,
    parameters,
)
from flagscale_like.families.weight_map import QKV, Direct, Exact, GatedMLP, PaddedVocab, RotaryLast, Rule, Shape

PREFIX = "model."  # of all names but the output layer's in transformers' models with an output layer
# The rules of one layer's q, k and v, from megatron-core's prefix, Hugging Face's prefix, and megatron-core's shapes by name.
QKVRules = Callable[[str, str, Mapping[str, Shape]], list[Rule]]


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
ATTENTION_RULES: dict[type[Block], Callable[..., list[Rule]]] = {
    GroupedQueryAttention: attention_rules,
    MultiLatentAttention: latent_attention_rules,
}
FEED_FORWARD_RULES: dict[type[Block], Callable[..., list[Rule]]] = {
    GatedFeedForward: gated_feed_forward_rules,
    MixtureOfExperts: expert_rules,
}


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
