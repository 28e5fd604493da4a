"""Mixture of experts: its configuration, and the feed-forward block that it makes of a layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from flagscale_like.arch.base import Frozen
from flagscale_like.arch.blocks import Block
from flagscale_like.arch.table import Parameter, Role


class Experts(Frozen):
    """Mixture of experts (Shazeer et al. 2017; Fedus et al. 2021): a router sends each token to `top_k` of `count` SwiGLU
    FFNs, and adds up their outputs, each times its weight. No token is dropped.

    Attributes:
        count: experts of a layer.
        top_k: experts that a token goes to.
        ffn_hidden_size: width of each expert's SwiGLU, after the gate.
        shared_ffn_hidden_size: width of an FFN beside the experts that every token goes through (DeepSeekMoE, Dai et al.
            2024); 0 leaves it out. Several shared experts are one FFN of their widths' sum.
        shared_gate: the shared FFN's output is multiplied with sigmoid(w x) (Qwen2-MoE).
        score: what makes the router's logits into scores: `softmax` over all experts, or `sigmoid` of each (DeepSeek-V3).
        normalize: the weights of a token's experts are their scores, divided by their sum. Without it, they are the scores.
        scale: factor on the weights (DeepSeek's routed_scaling_factor).
        groups: groups of equal size into which the experts fall, of which a token uses the `top_groups` best (DeepSeek);
            1 leaves the choice free.
        top_groups: groups that a token may use.
        group_score: what the best groups are: those of the largest single score (`max`, DeepSeek-V2), or of the largest sum
            of two scores (`top2`, DeepSeek-V3).
        balance: tokens over which the auxiliary loss evens out the experts' load (Fedus et al. 2021, equation 4): a
            micro-batch's (`batch`), or each row's by itself (`sequence`, DeepSeek-V2), which does not depend on the
            micro-batch size. `none` adds no such loss.
        coefficient: factor on the auxiliary loss.
        bias_rate: by how much each step raises the bias of an expert with fewer tokens than the mean, and lowers that of one
            with more (Wang et al. 2024, "Auxiliary-loss-free load balancing"). The bias is added to the scores when experts
            are chosen, and not to the weights. 0 has no bias; above 0 it needs score sigmoid.
        bias: whether there is such a bias. It follows from bias_rate; a model that comes with one keeps it at rate 0.
        z_loss: factor on the mean of log(sum of exp(logits))², which keeps the router's logits small (Zoph et al. 2022).
        dense_layers: layers, counted from 0, that have a dense FFN of model.ffn_hidden_size instead. A number n stands for
            the first n layers.
    """

    count: int = Field(gt=1)
    top_k: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    shared_ffn_hidden_size: int = Field(default=0, ge=0)
    shared_gate: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = Field(default=1.0, gt=0)
    groups: int = Field(default=1, gt=0)
    top_groups: int = Field(default=1, gt=0)
    group_score: Literal["max", "top2"] = "top2"
    balance: Literal["batch", "sequence", "none"] = "batch"
    coefficient: float = Field(default=0.01, ge=0)
    bias_rate: float = Field(default=0.0, ge=0)
    bias: bool = False
    z_loss: float = Field(default=0.0, ge=0)
    dense_layers: tuple[int, ...] = ()

    @field_validator("dense_layers", mode="before")
    @classmethod
    def _first(cls, value: object) -> object:
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("bias_rate") and "bias" not in values:
            return {**values, "bias": True}
        return values

    @model_validator(mode="after")
    def _check(self) -> Experts:
        if self.top_k > self.count:
            raise ValueError(f"experts.top_k ({self.top_k}) must be at most experts.count ({self.count})")
        if self.shared_gate and not self.shared_ffn_hidden_size:
            raise ValueError("experts.shared_gate needs experts.shared_ffn_hidden_size: there is no shared FFN to gate")
        if (self.bias or self.bias_rate) and self.score == "softmax":
            raise ValueError(
                "experts.bias needs experts.score sigmoid: a bias beside softmax scores would change with all other logits"
            )
        if self.bias_rate and not self.bias:
            raise ValueError(f"experts.bias_rate ({self.bias_rate}) needs experts.bias true")
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "experts.normalize with experts.top_k 1 makes every weight 1, and the router would learn nothing: set "
                "experts.normalize false"
            )
        if self.score == "sigmoid" and not self.normalize and self.top_k > 1:
            raise ValueError("experts.normalize false needs experts.score softmax, or top_k 1")
        self._check_groups()
        if list(self.dense_layers) != sorted(set(self.dense_layers)) or min(self.dense_layers, default=0) < 0:
            raise ValueError(
                f"experts.dense_layers {list(self.dense_layers)} must be layers, counted from 0, each once and in order"
            )
        return self

    def _check_groups(self) -> None:
        if self.count % self.groups:
            raise ValueError(f"experts.count ({self.count}) must be divisible by experts.groups ({self.groups})")
        if self.top_groups > self.groups:
            raise ValueError(f"experts.top_groups ({self.top_groups}) must be at most experts.groups ({self.groups})")
        reachable = self.top_groups * self.count // self.groups
        if self.top_k > reachable:
            raise ValueError(
                f"experts.top_k ({self.top_k}) exceeds the {reachable} experts of experts.top_groups ({self.top_groups}) "
                "groups"
            )
        if self.groups > 1 and self.group_score == "top2" and self.count // self.groups < 2:
            raise ValueError("experts.group_score top2 needs groups of at least two experts: use max")

    @property
    def balances(self) -> bool:
        """Whether an auxiliary loss evens out the load."""
        return self.balance != "none" and self.coefficient > 0


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(Block):
    """A router, the experts, and a shared FFN where there is one. Parameters of all experts are stacked along dimension 0."""

    hidden_size: int
    experts: Experts

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        """Those of the block in layer `layer`, in the built model's order."""
        at, h, x = f"decoder.layers.{layer}.mlp.", self.hidden_size, self.experts
        e, f, shared = x.count, x.ffn_hidden_size, x.shared_ffn_hidden_size
        place = functools.partial(Parameter, layer=layer)
        found = [place(at + "router.weight", (e, h), Role.ROUTER, None)]
        if x.bias:
            found.append(place(at + "router.expert_bias", (e,), Role.ROUTER_BIAS, None))
        found += [
            place(at + "experts.linear_fc1.weight", (e, 2 * f, h), Role.FFN_IN, None, blocks=2, experts=e),
            place(at + "experts.linear_fc2.weight", (e, h, f), Role.FFN_OUT, None, experts=e),
        ]
        if x.shared_gate:
            found.append(place(at + "shared_experts.gate_weight", (1, h), Role.ROUTER, None))
        if shared:
            found += [
                place(at + "shared_experts.linear_fc1.weight", (2 * shared, h), Role.FFN_IN, 0, blocks=2),
                place(at + "shared_experts.linear_fc2.weight", (h, shared), Role.FFN_OUT, 1),
            ]
        return tuple(found)

    @property
    def matrix_parameters(self) -> int:
        """Elements of the matrices that a token is multiplied with: `top_k` experts', the router's, the shared FFN's."""
        return active(self.parameters(0), self.experts.top_k, matrices=True)


def active(parameters: Sequence[Parameter], top_k: int, *, matrices: bool = False) -> int:
    """Elements that one token meets: of what is stacked over experts, `top_k` experts' part.

    Args:
        matrices: count those that a token is multiplied with, and no norms and biases.
    """
    counted = [p for p in parameters if not matrices or p.role.is_layer_matrix or p.role is Role.ROUTER]
    return sum(p.numel * top_k // p.experts if p.experts else p.numel for p in counted)
