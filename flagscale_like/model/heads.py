"""Heads: what the last pipeline stage computes from the final hidden states.

A head is the `output_layer` of megatron-core's GPTModel, with one method more: `finish` turns hidden states into what the
model returns. megatron-core reads `weight` of every output layer, so each head has that attribute. A head's weight is used
within a call of the module alone: there the optimizer's all-gather of it, which may still run, is waited for.

    language_model   logits [b, s, v/tp], or, given labels, each token's cross-entropy [b, s]
    value            one number a token [b, s], or k of them [b, s, k]: a reward or value model
    hidden           the hidden states themselves [b, s, h]: an embedding model
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from flagscale_kernels import cross_entropy, fused_linear_cross_entropy
from flagscale_like.model.modules import mark


class LanguageModelHead(ColumnParallelLinear):
    """Logits over the vocabulary, of which each tensor-parallel rank computes its rows' part, and their cross-entropy.

    The logits of the padded rows are -inf: they take no part in the loss, so that the loss depends on no tp, and their
    weights stay zero.

    Args:
        vocab_size, padded_vocab_size: rows of the whole matrix, without and with padding.
        normalize: scale the rows of the matrix to length 1 first (NormHead: Yang et al. 2023, section 2.4). A row lies on one
            rank, so this needs no communication.
        temperature: divides the logits in the cross-entropy.
        tied_here: the weight is the embedding's, on this rank; it comes with each call.
        fused: compute product and loss in one operator that holds the logits of a chunk of tokens at a time.
        backend: of the cross-entropy, as flagscale_kernels names it.
    """

    def __init__(  # what ColumnParallelLinear needs, and what is ours
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        normalize: bool,
        temperature: float,
        tied_here: bool,
        fused: bool,
        backend: str | None,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            config.hidden_size,
            padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=tied_here,
            tp_group=tp_group,
        )
        self.normalize, self.fused, self.backend, self.vocab_size = normalize, fused, backend, vocab_size
        self.temperature = temperature
        if normalize:
            # The fusion adds the gradient to weight.main_grad; here it has to pass through the normalisation first.
            self.gradient_accumulation_fusion = False
        first_row = tp_group.rank() * self.output_size_per_partition
        self.rows = min(max(vocab_size - first_row, 0), self.output_size_per_partition)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (s/tp under sequence parallelism) -> logits [s, b, v/tp] and no bias, or see _fused_loss()."""
        if labels is not None:
            return self._fused_loss(input_, weight, labels), None
        if self.normalize:
            weight = F.normalize(self.weight, dim=-1)
        logits, bias = super().forward(input_, weight, False)
        if self.rows < self.output_size_per_partition:
            # Outside autograd: the softmax gives these columns probability 0, hence the gradient 0.
            with torch.no_grad():
                logits[..., self.rows :].fill_(float("-inf"))
        return logits, bias

    def finish(self, hidden: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        """Logits [b, s, v/tp], or each token's cross-entropy, fp32 [b, s], where there are labels.

        Args:
            hidden: [s, b, h] (s/tp under sequence parallelism).
            labels: [b, s].
            weight: the embedding's, where it is tied; else None.
        """
        if labels is None:
            logits, _ = self(hidden, weight)
            return logits.transpose(0, 1).contiguous()  # [s, b, v] -> [b, s, v]
        if self.temperature != 1:
            hidden = hidden / self.temperature  # the head is linear and has no bias
        if self.fused:
            losses, _ = self(hidden, weight, labels=labels)
            return losses
        logits, _ = self(hidden, weight)
        # The backward pass writes the logits' gradient over them: nothing else reads what `forward` has made.
        options: dict[str, Any] = {"reduction": "none", "inplace_backward": True, "backend": self.backend}
        return cross_entropy(logits, labels.t(), group=self.tp_group, **options).t()

    def _fused_loss(self, hidden: Tensor, weight: Tensor | None, labels: Tensor) -> Tensor:
        """The cross-entropy of each token, fp32 [b, s], by product and loss in one operator."""
        matrix = self.weight if weight is None else weight
        return fused_linear_cross_entropy(
            hidden,
            F.normalize(matrix, dim=-1) if self.normalize else matrix,
            labels.t(),
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            vocab_size=self.vocab_size,
            reduction="none",
            accumulate_main_grad=self.gradient_accumulation_fusion,
            backend=self.backend,
        ).t()


class ValueHead(MegatronModule):
    """k numbers a token: hidden states times a [k, h] matrix. Every tensor-parallel rank holds the whole matrix."""

    def __init__(self, config: TransformerConfig, outputs: int, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(outputs, config.hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism a rank sees its part of the tokens: megatron-core then sums the gradient over tp.
        mark(self.weight, sequence_parallel=config.sequence_parallel)
        self.sequence_parallel, self.tp_group = config.sequence_parallel, tp_group

    def forward(self, hidden: Tensor) -> Tensor:
        """[s, b, h] (s/tp under sequence parallelism) -> [s, b, k]."""
        return F.linear(hidden, self.weight)

    def finish(self, hidden: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        """[s, b, h] (s/tp under sequence parallelism) -> fp32 [b, s, k], or [b, s] where k is 1."""
        values = self(hidden).float()  # [s, b, k]
        values = whole_sequence(values, self).transpose(0, 1)
        return values.squeeze(-1) if len(self.weight) == 1 else values


class HiddenHead(MegatronModule):
    """The hidden states after the final norm. It has no weight."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config)
        self.weight: Tensor | None = None
        self.sequence_parallel, self.tp_group = config.sequence_parallel, tp_group

    def finish(self, hidden: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        """[s, b, h] (s/tp under sequence parallelism) -> [b, s, h]."""
        return whole_sequence(hidden, self).transpose(0, 1)


def whole_sequence(x: Tensor, head: ValueHead | HiddenHead) -> Tensor:
    """[s/tp, b, ...] of every tensor-parallel rank -> [s, b, ...] on each. Every rank computes the same from it.

    The backward pass therefore takes this rank's part of the gradient, and does not sum the ranks' (equal) gradients.
    """
    if not head.sequence_parallel:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=head.tp_group)
