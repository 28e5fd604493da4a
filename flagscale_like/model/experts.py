"""Mixture of experts: megatron-core's layer and dispatcher, with a router whose auxiliary losses hold on every layout, and
experts as one grouped matrix product.

Tensor parallelism does not cut experts: the ranks of a tensor-parallel group hold different experts, or copies of them, and
each sends the tokens of its own part of the sequence. The gradient of an expert is a sum over the ranks that hold a copy.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor, nn

from flagscale_kernels import collect_tokens, spread_tokens, swiglu, token_order
from flagscale_like.arch import Experts
from flagscale_like.model.modules import in_backward, mark


class Router(TopKRouter):
    """Scores of the experts, the choice of a token's top_k, and the auxiliary losses; config.Experts has the papers.

    The gate is megatron-core's, and so is the choice. The auxiliary losses are our own: under per-token loss those of
    megatron-core 0.16.1 are too weak by tp * cp, and the one per sequence by the micro-batch size as well, because they are
    scaled with the tokens of one rank while the gradients are divided by those of all. Here the loss of a row, a mean over
    its tokens, is multiplied with what the row adds to the count that divides the gradients. The step then learns the mean
    over rows, weighted with their counts, whatever the objective counts.

    Attributes:
        row_counts: fp32 [rows], what each row of the current micro-batch adds to that count. The engine sets it before each
            forward pass.
        tokens_per_expert: int64 [experts], the tokens of this rank since take_load(): bf16 models round no integers.
        entropy: float64, of the tokens' scores, summed over these tokens, in nats.
        load: of the last step over all ranks; see take_load().
        expert_bias: fp32 [experts] or None, also in bf16 models. No gradient changes it: see update_bias().
    """

    def __init__(self, *, experts: Experts, rows: int, **options: Any) -> None:
        super().__init__(**options)  # what megatron-core's layer gives its router differs by version
        self.experts, self.rows = experts, rows
        device = self.weight.device
        self.expert_bias = None
        if experts.bias:
            bias = torch.zeros(experts.count, dtype=torch.float32, device=device)
            self.expert_bias = nn.Parameter(bias, requires_grad=False)
        counts = torch.zeros(experts.count, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts, persistent=False)
        self.register_buffer("entropy", torch.zeros((), dtype=torch.float64, device=device), persistent=False)
        # megatron-core asks the object at this name for the choice. Its own has groups of the largest sums only.
        self.router_replay = _BestGroups(experts) if experts.groups > 1 else None
        self.row_counts = torch.ones(rows, device=device)
        self._recomputed: deque[Tensor] = deque()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits: [s, b, experts] -> each token's weights of the experts [s * b, experts], and which it goes to."""
        s, b, count = logits.shape
        logits, experts = logits.view(-1, count), self.experts
        probs, chosen = topk_routing_with_score_function(
            logits,
            experts.top_k,
            use_pre_softmax=experts.score == "softmax" and not (experts.normalize and experts.top_k > 1),
            scaling_factor=experts.scale if experts.scale != 1.0 else None,
            score_function=experts.score,
            expert_bias=self.expert_bias,
            router_replay=self.router_replay,
        )
        if not self.training:
            return probs, chosen
        weights = self._weights()
        if torch.is_grad_enabled():
            # Without bias and groups: what the auxiliary loss and the entropy are of. A graph only where a loss needs it.
            with torch.set_grad_enabled(experts.balances):
                best, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
            self.tokens_per_expert += chosen.sum(0)
            self.entropy -= torch.xlogy(scores.detach(), scores.detach()).sum()
            if experts.balances or experts.z_loss:
                rows = self._tokens_of_rows(s, b, logits.device)
                loss = self._auxiliary_loss(logits, best, scores, rows, weights)
                probs = MoEAuxLossAutoScaler.apply(probs, loss)
        return probs, chosen

    def _weights(self) -> Tensor:
        """row_counts of the micro-batch that this pass is of.

        A layer that is recomputed in the backward pass runs when the engine is at a later micro-batch. The backward passes of
        a chunk come in the order of its forward passes.
        """
        if in_backward():
            return self._recomputed.popleft()
        if not torch.is_grad_enabled():
            self._recomputed.append(self.row_counts)
        return self.row_counts

    def take_load(self) -> Tensor:
        """int64 [experts + 1], since the last call: this rank's tokens that went to each expert; the entropy in millinats."""
        load = torch.cat((self.tokens_per_expert, (1000 * self.entropy).round().long()[None]))
        self.tokens_per_expert.zero_()
        self.entropy.zero_()
        return load

    @torch.no_grad()
    def update_bias(self) -> None:
        """Raise the bias of the experts that had fewer tokens than the mean in this step, and lower that of those with more.

        Wang et al. 2024, algorithm 1.
        """
        if self.experts.bias_rate:
            tokens = self.load[:-1].double()
            self.expert_bias += torch.sign(tokens.mean() - tokens).float() * self.experts.bias_rate

    def forget_recompute(self) -> None:
        """Drop what passes that never came back have left; before each step."""
        self._recomputed.clear()

    def _auxiliary_loss(self, logits: Tensor, best: Tensor, scores: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """The micro-batch's losses, coefficients and weights included: of this rank's tokens; all ranks' add up to them.

        Args:
            best: bool [t, experts], the top_k of each token's scores.
            rows: fp32 [rows, t], see _tokens_of_rows().
            weights: fp32 [rows].
        """
        length = rows.shape[1] * self.tp_cp_group.size() / len(rows)
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.experts.z_loss:
            squares = torch.logsumexp(logits.float(), -1).square()
            loss = loss + self.experts.z_loss * (weights * (rows @ squares)).sum() / length
        if self.experts.balances:
            if self.experts.balance == "batch":
                rows, weights, length = rows.sum(0, keepdim=True), weights.sum(0, keepdim=True), length * len(rows)
            counts = rows @ best.float()  # [rows, experts]
            if self.tp_cp_group.size() > 1:
                dist.all_reduce(counts, group=self.tp_cp_group)
            of_rows = balance_loss(counts, rows @ scores, length, self.topk)
            loss = loss + self.experts.coefficient * (weights * of_rows).sum()
        return loss

    def _tokens_of_rows(self, s: int, b: int, device: torch.device) -> Tensor:
        """fp32 [rows, s * b]: 1 where the token is of the row.

        A pack's rows lie one after another: of each, a context-parallel rank has its part, and with SP a tensor-parallel rank
        has the next part of what then follows.
        """
        token = torch.arange(s * b, device=device)
        if b == self.rows:
            row = token % b
        else:
            ranks = self.tp_group.size() if self.config.sequence_parallel else 1
            row = (self.tp_group.rank() * s + token if ranks > 1 else token) // (s * ranks // self.rows)
        return (row[None] == torch.arange(self.rows, device=device)[:, None]).float()


def balance_loss(counts: Tensor, scores: Tensor, length: float, top_k: int) -> Tensor:
    """Of each row: experts times the sum over experts of (share of the choices) * (mean score). 1 where the load is even.

    Equation 4 of Fedus et al. 2021; equations 23 to 25 of DeepSeek-V2.

    Args:
        counts: [rows, experts], the row's tokens that go to each.
        scores: [rows, experts], the sum of the row's scores; of one rank's tokens gives that rank's part.
        length: tokens of a row.
    """
    return (counts * scores).sum(-1) * counts.shape[1] / (top_k * length * length)


class _BestGroups:
    """The choice among the experts of a token's best groups; config.Experts says which are the best."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    def get_replay_topk(self, scores: Tensor, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
        """scores: [t, experts] -> the chosen scores and experts, each [t, top_k]."""
        groups, top_groups, kind = self.experts.groups, self.experts.top_groups, self.experts.group_score
        by_group = scores.view(len(scores), groups, -1)
        worth = by_group.topk(1 if kind == "max" else 2, dim=-1).values.sum(-1)  # [t, groups]
        best = worth.topk(top_groups, dim=-1).indices
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
        return by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(1).topk(top_k, dim=-1)


class GroupedLinear(MegatronModule):
    """The matrices of this rank's experts, [e, out, in], as one product (torch.nn.functional.grouped_mm).

    Bit-equal to one product for each expert.
    """

    def __init__(self, config: TransformerConfig, experts: int, out: int, inner: int, shared: bool) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(experts, out, inner, dtype=config.params_dtype))
        mark_expert(self.weight, copies_as_dense=shared)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x: [t, in] in the order of the experts -> [t, out]. ends: int32 [e], where each expert's tokens end."""
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)


def mark_expert(parameter: nn.Parameter, *, copies_as_dense: bool) -> None:
    """Tell megatron-core where an expert's parameter lies.

    Args:
        copies_as_dense: its copies are on the ranks that hold copies of the dense parameters, and it is reduced with them.
    """
    mark(parameter, of_expert=True, allreduce=copies_as_dense)
    # What is not marked counts in the gradient norm on the first tensor-parallel rank alone, and here each rank's counts.
    mark(parameter, tensor_model_parallel=True, partition_dim=0, partition_stride=1)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether the parameter is of the experts that lie over expert-parallel ranks."""
    return getattr(parameter, "of_expert", False)


class GroupedExperts(MegatronModule):
    """This rank's experts: SwiGLU between two grouped products, the tokens' weights multiplied in between.

    On CUDA the counts stay on the device where the dispatcher leaves them there: the host waits for nothing here.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        backend: str | None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.backend = backend
        h, f = config.hidden_size, config.moe_ffn_hidden_size
        shared = config.expert_model_parallel_size == config.tensor_model_parallel_size == 1
        self.linear_fc1 = GroupedLinear(config, num_local_experts, 2 * f, h, shared)
        self.linear_fc2 = GroupedLinear(config, num_local_experts, h, f, shared)

    def forward(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """x: [t, h] in the order of the experts; probs: [t], the weights -> [t, h], and no bias."""
        ends = tokens_per_expert.to(x.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        gated = swiglu(self.linear_fc1(x, ends), weight=probs, backend=self.backend)
        return self.linear_fc2(gated, ends), None


class ExpertLayer(MoELayer):
    """megatron-core's layer of experts. Where this rank holds them all, tokens are put in order here and not sent."""

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        if self.ep_group.size() == 1:
            self.token_dispatcher = LocalDispatcher(config, self.token_dispatcher, self.experts.backend)


class LocalDispatcher(MoETokenDispatcher):
    """Puts the tokens of this rank into the order of the experts, and back. The host waits for nothing.

    Args:
        dispatcher: megatron-core's, whose groups this one has.
        backend: of the permutation.
    """

    def __init__(self, config: TransformerConfig, dispatcher: MoETokenDispatcher, backend: str | None) -> None:
        groups = {"ep": dispatcher.ep_group, "expt_tp": dispatcher.tp_group, "tp_ep": dispatcher.tp_ep_group}
        super().__init__(config, ProcessGroupCollection(**groups))
        self.backend = backend

    def dispatch_preprocess(self, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [s, b, h] -> the tokens, once for each expert that they go to, [s * b * top_k, h], and their weights."""
        self.shape = hidden.shape
        top_k = self.config.moe_router_topk
        experts = routing_map.to(torch.int8).topk(top_k, dim=1).indices  # [t, k]
        self.order = token_order(experts)
        self.tokens_per_expert = routing_map.sum(0)
        weights, (_, inverse) = probs.gather(1, experts).flatten(), self.order
        spread = spread_tokens(hidden.reshape(-1, hidden.shape[-1]), *self.order, backend=self.backend)
        return spread, torch.zeros_like(weights).scatter(0, inverse.flatten(), weights)

    def token_dispatch(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is sent."""
        return hidden, probs

    def dispatch_postprocess(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts take."""
        return hidden, self.tokens_per_expert, probs

    def combine_preprocess(self, hidden: Tensor) -> Tensor:
        """Nothing is sent."""
        return hidden

    token_combine = combine_preprocess

    def combine_postprocess(self, hidden: Tensor) -> Tensor:
        """[s * b * top_k, h] in the order of the experts -> [s, b, h], the sums of each token's experts."""
        return collect_tokens(hidden, *self.order, backend=self.backend).view(self.shape)
