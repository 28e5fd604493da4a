"""The planner's inputs: the shape of a decoder, and a parallel layout."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flagscale_like.arch import Experts, Layer, MixtureOfExperts, ModelArch, Parameter, Role, active, counted_keys
from flagscale_like.config import ContextParallelKind, Lora, RunConfig

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Layout.imbalance where nothing is given: an assumption for a balanced router, not a measurement.
IMBALANCE = 1.2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a decoder its time and activations depend on.

    Attributes:
        ffn: channels of the MLP; of one half where it is gated.
        gated: SwiGLU's two up projections, or one (GPT).
        flash: attention without its [s, s] scores in memory.
        dropout: GPT's three dropouts a layer, each with a saved mask of one byte an element.
        window: keys a query sees; all before it where it is None.
        causal: whether a query sees no key after it.
        norm_head: as in ModelArch.
        decoder: ModelArch's layers, whose blocks say what is computed and saved; () for a decoder that ModelArch does not
            describe.
        adapters: LoRA's parameters, which are then all that is trained.
        lora: their options; None without LoRA.
        outputs: numbers a token that a value head computes in the place of an output layer, 0 where the model gives its
            hidden states; None for a language model.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    flash: bool = True
    dropout: bool = False
    window: int | None = None
    causal: bool = True
    norm_head: bool = False
    decoder: tuple[Layer, ...] = ()
    adapters: tuple[Parameter, ...] = ()
    lora: Lora | None = None
    outputs: int | None = None

    @classmethod
    def of(cls, arch: ModelArch, tp: int = 1, lora: Lora | None = None, outputs: int | None = None) -> Shape:
        """The shape of a model, its vocabulary padded for `tp`."""
        return _shape_of(arch, tp, lora, outputs)

    @classmethod
    def gpt(cls, *, layers: int, hidden: int, heads: int, vocab: int = 51200) -> Shape:
        """A GPT-2-like decoder as in Narayanan et al. 2021 and Korthikanti et al. 2022: 4h MLP, dropout, scores in memory."""
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            groups=heads,
            head_dim=hidden // heads,
            ffn=4 * hidden,
            vocab=vocab,
            gated=False,
            flash=False,
            dropout=True,
        )

    @functools.cached_property
    def alike(self) -> tuple[int, ...]:
        """Of each layer, the number of the first one that is like it."""
        first: dict[Layer, int] = {}
        return tuple(first.setdefault(layer, i) for i, layer in enumerate(self.decoder)) or (0,) * self.layers

    @functools.cached_property
    def kinds(self) -> dict[int, int]:
        """How many layers there are of each kind, by the number of its first one."""
        return dict(Counter(self.alike))

    def adapters_of(self, layer: int) -> tuple[Parameter, ...]:
        """LoRA's parameters of one layer."""
        return self._adapters.get(layer, ())

    @functools.cached_property
    def _adapters(self) -> dict[int, tuple[Parameter, ...]]:
        return {i: tuple(p for p in self.adapters if p.layer == i) for i in self.kinds}

    @property
    def layer_matrix_parameters(self) -> int:
        """Elements of a layer's weight matrices, of a decoder that ModelArch does not describe."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        return attention + self.hidden * self.ffn * (3 if self.gated else 2)

    @functools.cached_property
    def experts(self) -> Experts | None:
        """Those of the layers that have some."""
        blocks = [layer.feed_forward for layer in self.decoder]
        return next((block.experts for block in blocks if isinstance(block, MixtureOfExperts)), None)

    @property
    def has_experts(self) -> bool:
        return self.experts is not None

    @property
    def top_k(self) -> int:
        """Experts that a token goes to; 1 without experts."""
        return self.experts.top_k if self.experts else 1

    @functools.cached_property
    def matrix_parameters(self) -> int:
        """Elements of the matrices that a token is multiplied with, the output layer's once and the embedding's not."""
        return self._layer_matrices(routers=True) + self.output_matrix

    @property
    def output_matrix(self) -> int:
        """Elements of the output layer; 0 without one. A value head's few rows are not counted."""
        return self.hidden * self.vocab if self.outputs is None else 0

    def _layer_matrices(self, *, routers: bool) -> int:
        if not self.decoder:
            return self.layers * self.layer_matrix_parameters
        found = 0
        for i, count in self.kinds.items():
            held = [p for p in self.decoder[i].parameters(i) if p.role.is_layer_matrix or p.role is Role.ROUTER]
            found += count * active([p for p in held if routers or p.role is not Role.ROUTER], self.top_k)
        return found

    def masked_flops(self, seq_length: int) -> float:
        """FLOPs of a token's forward pass that model_flops() counts and causal attention does not compute."""
        if not self.decoder:
            return self.layers * 2.0 * self.heads * self.head_dim * counted_keys(seq_length, self.window)
        passes = {
            i: [self.decoder[i].flops_per_token(seq_length, causal=causal) for causal in (False, True)]
            for i in self.kinds
        }
        return sum(count * (passes[i][0] - passes[i][1]) for i, count in self.kinds.items())

    def model_flops(self, tokens: int, seq_length: int, *, recompute_layers: bool = False) -> float:
        """FLOPs of a step, attention counted in full (Narayanan et al. 2021, eq. 3).

        Args:
            recompute_layers: count the layers' second forward pass, as that paper does ("hardware FLOPs").
        """
        if self.decoder:
            passes = {i: self.decoder[i].flops_per_token(seq_length, causal=False) / 2 for i in self.kinds}
            layers = sum(count * passes[i] for i, count in self.kinds.items())
        else:
            keys = counted_keys(seq_length, self.window)
            layers = self.layers * (self.layer_matrix_parameters + 2 * self.heads * self.head_dim * keys)
        flops = (8.0 if recompute_layers else 6.0) * layers + 6.0 * self.output_matrix
        if self.adapters:  # no gradient of the matrices is computed
            own = active([p for p in self.adapters if p.role is not Role.ADAPTER_MAGNITUDE], self.top_k)
            frozen = self._layer_matrices(routers=False) + self.output_matrix
            flops += (8.0 if recompute_layers else 6.0) * own - 2.0 * frozen
        return tokens * flops


@functools.lru_cache(maxsize=256)
def _shape_of(arch: ModelArch, tp: int, lora: Lora | None, outputs: int | None) -> Shape:
    return Shape(
        layers=arch.num_layers,
        hidden=arch.hidden_size,
        heads=arch.num_attention_heads,
        groups=arch.num_query_groups,
        head_dim=arch.head_dim,
        ffn=arch.ffn_hidden_size,
        vocab=arch.padded_vocab_size(tp),
        window=arch.sliding_window,
        causal=arch.attention == "causal",
        norm_head=arch.norm_head,
        decoder=arch.layers,
        adapters=lora.parameters(arch) if lora is not None else (),
        lora=lora,
        outputs=outputs,
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A parallel layout: degrees, micro-batches, recompute, offload. Ranks are numbered tp fastest, then cp, dp and pp.

    Attributes:
        cp, cp_kind: context-parallel ranks, and how attention brings their parts of a row together; see config.Parallel.
        ep: expert-parallel ranks, which are taken from those of tp, cp and dp.
        imbalance: tokens that come to the expert-parallel rank with the most, relative to the mean. Its activations have to
            fit, and the others wait for it. 1 is an even load; no rank can get more than ep. Without meaning where ep is 1.
        num_microbatches: micro-batches a data-parallel rank runs a step.
        offload: share of its activations that each stage moves to host memory; () moves none.
        first_stage_layers, last_stage_layers: layers of these stages where they differ from the others'.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    cp: int = 1
    cp_kind: ContextParallelKind = "gather"
    ep: int = 1
    sp: bool = False
    micro_batch_size: int = 1
    num_microbatches: int = 1
    recompute: Recompute = "none"
    offload: tuple[float, ...] = ()
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    imbalance: float = IMBALANCE

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Layout:
        """The configured layout on `world_size` ranks.

        Raises:
            ConfigError: the world size or the batch does not fit it.
        """
        par, train = config.parallel, config.train
        dp = config.data_parallel_size(world_size)
        return cls(
            tp=par.tp,
            pp=par.pp,
            vpp=par.vpp,
            dp=dp,
            cp=par.cp,
            cp_kind=par.cp_kind,
            ep=par.ep,
            sp=par.sp,
            micro_batch_size=train.micro_batch_size,
            num_microbatches=train.global_batch_size // (train.micro_batch_size * dp),
            recompute=train.recompute,
            first_stage_layers=par.first_stage_layers,
            last_stage_layers=par.last_stage_layers,
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, and own a part of their gradients and optimizer states each."""
        return self.cp * self.dp

    @property
    def expert_replicas(self) -> int:
        """The same of experts, which are not cut over tp."""
        return self.tp * self.cp * self.dp // self.ep

    @property
    def cuts_experts(self) -> bool:
        """Whether copies of an expert lie on other ranks than those of the dense parameters."""
        return self.tp > 1 or self.ep > 1

    @property
    def fullest(self) -> float:
        """Tokens of the expert-parallel rank with the most, relative to the mean."""
        return min(self.imbalance, self.ep)

    def rows(self, seq_length: int) -> float:
        """Tokens of a micro-batch that a rank has, before sequence parallelism."""
        return seq_length * self.micro_batch_size / self.cp

    def chunk_layers(self, num_layers: int, stage: int) -> list[list[int]]:
        """The layers (counted from 0 over the model) of each chunk that a stage holds, as megatron-core assigns them.

        With vpp, a first or a last stage of fewer layers has them missing where the embedding, or the head, is.
        """
        counts = tuple(self.stage_layers(num_layers))
        return _chunk_layers(counts, self.vpp)[stage]

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage."""
        first, last = self.first_stage_layers, self.last_stage_layers
        middle = self.pp - bool(first) - bool(last)
        each = (num_layers - (first or 0) - (last or 0)) // middle if middle else 0
        counts = [each] * self.pp
        if first:
            counts[0] = first
        if last:
            counts[-1] = last
        return counts

    def chunks_in_flight(self, stage: int) -> int:
        """Most forward passes of a chunk that wait for their backward pass at once.

        1F1B: pp - stage micro-batches; interleaved: 2 (pp - stage - 1) + (vpp - 1) pp + 1 chunks (Narayanan et al. 2021,
        figure 4).
        """
        if self.vpp == 1:
            return min(self.pp - stage, self.num_microbatches)
        warmup = 2 * (self.pp - stage - 1) + (self.vpp - 1) * self.pp
        return min(warmup + 1, self.num_microbatches * self.vpp)

    def most_in_flight(self, stage: int, chunks: Sequence[float]) -> float:
        """The most that the forward passes hold that wait for their backward pass at once, in the order of the schedule.

        Args:
            chunks: what one micro-batch holds of each of the stage's chunks.
        """
        warmup, total = self.chunks_in_flight(stage) - 1, self.num_microbatches * self.vpp
        if min(chunks) == max(chunks):
            return (warmup + 1) * chunks[0]
        # Groups of pp micro-batches pass through one chunk after the other, backward in the opposite order.
        forward = [chunks[k // self.pp % self.vpp] for k in range(min(total, warmup + 1 + self.pp * self.vpp))]
        held = most = sum(forward[: warmup + 1])
        for k, more in enumerate(forward[warmup + 1 :]):  # then one forward pass for each backward pass
            held += more - chunks[self.vpp - 1 - k // self.pp % self.vpp]
            most = max(most, held)
        return most

    def offload_share(self, stage: int) -> float:
        return self.offload[stage] if self.offload else 0.0

    @property
    def bubble(self) -> float:
        """Idle share of the pipeline's ideal time: (pp - 1) / (vpp m)."""
        return (self.pp - 1) / (self.vpp * self.num_microbatches)

    def describe(self) -> str:
        parts = [f"tp {self.tp}", f"pp {self.pp}"]
        parts += [f"vpp {self.vpp}"] if self.vpp > 1 else []
        parts += [f"first stage {self.first_stage_layers}"] if self.first_stage_layers else []
        parts += [f"last stage {self.last_stage_layers}"] if self.last_stage_layers else []
        parts += [f"cp {self.cp}{' a2a' if self.cp_kind == 'a2a' else ''}"] if self.cp > 1 else []
        parts += [f"ep {self.ep}"] if self.ep > 1 else []
        parts += [f"dp {self.dp}", *(["sp"] if self.sp else []), f"mbs {self.micro_batch_size}"]
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        parts += [f"offload {max(self.offload):.0%}"] if self.offload and max(self.offload) > 0 else []
        return " ".join(parts)


@functools.lru_cache(maxsize=1024)
def _chunk_layers(counts: tuple[int, ...], vpp: int) -> list[list[list[int]]]:
    """The layers of each chunk of each stage.

    Args:
        counts: layers of each stage.
    """
    last, each = len(counts) - 1, -(-max(counts) // vpp)
    found: list[list[list[int]]] = [[] for _ in counts]
    start = 0
    for chunk in range(vpp):
        for stage, count in enumerate(counts):
            holds_end = chunk == (vpp - 1 if stage == last else 0)
            size = each - (vpp * each - count if holds_end else 0)
            found[stage].append(list(range(start, start + size)))
            start += size
    return found
