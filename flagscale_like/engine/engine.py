"""Engine: one model on this rank, with or without an optimizer. It is the mechanism of training, and holds no policy.

An engine runs megatron-core's pipeline schedules, and knows neither data nor what is reported. What it learns is an
objective (engine.objective); when it learns, evaluates and saves is the training loop's business.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from flagscale_like.arch import OUTPUT_NAME, is_adapter
from flagscale_like.checkpoint.format import CheckpointReader, keys_of, value_heads_of
from flagscale_like.checkpoint.shard import Shard
from flagscale_like.checkpoint.store import WeightSource
from flagscale_like.config import Optimizer
from flagscale_like.data.batch import Batch
from flagscale_like.engine.gradient_cache import ForwardPass, GlobalBatch, SecondPass, VectorsOf
from flagscale_like.engine.load import Left, base_record, load_optimizer, load_weights
from flagscale_like.engine.objective import BatchObjective, Objective, VectorObjective
from flagscale_like.engine.optimizer import build_optimizer
from flagscale_like.engine.shards import OwnedShard, adam_step, ensure_moments, loss_scaler_state, owned_shards
from flagscale_like.errors import CheckpointError, ConfigError, required
from flagscale_like.model.build import LanguageModel, build_chunks, unwrap, wrap_chunks
from flagscale_like.model.experts import Router
from flagscale_like.model.initialise import initialize_weights
from flagscale_like.model.lora import adapters_off
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import ParallelContext
from flagscale_like.runtime.random_state import random_states, set_random_states
from flagscale_like.runtime.row_cut import RowCut
from flagscale_like.runtime.storage import memory_of


@dataclass
class Outputs:
    """What a pass over some micro-batches gave on this rank. Nothing is reduced, and all tensors are on the device.

    Attributes:
        sums: `total`, `count` and the objective's sums, added up over the micro-batches; 0 on ranks that another one counts
            for (other stages than the last, and all but the first tensor-parallel rank). Context-parallel ranks count their
            tokens each, or the first one the rows; see Objective.cut.
        samples: the objective's samples in the order of the micro-batches, [micro-batches * b], of whole rows; empty on those
            other ranks and on all but the first context-parallel rank.
        grad_square: of the gradients, this rank's part of the squared L2 norm, float64; 0 without a backward pass.
        overflow: whether the fp16 gradients overflowed, on any rank.
    """

    sums: dict[str, Tensor | float]
    samples: dict[str, Tensor] = field(default_factory=dict)
    grad_square: Tensor | float = 0.0
    overflow: bool = False


class Engine:
    """A model's chunks on this rank, and their optimizer. Make one with `build`.

    Attributes:
        name: prefix of the model's keys in a checkpoint, so that one checkpoint holds several models; empty for the only one.
        models: this rank's chunks of the model, as they are.
        chunks: the same, wrapped for gradient reduction where there is an optimizer.
        optimizer: None for a model that is only run.
        left: what a load that was not strict left at its initial values, in words.
        base: of a model with LoRA, the record of the weights that its adapters belong to; None where they were drawn.
        asleep: what only training needs is in host memory; see engine.asleep.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ctx: ParallelContext,
        models: list[LanguageModel],
        *,
        name: str = "",
        left: list[str] | None = None,
    ) -> None:
        self.spec, self.ctx, self.models, self.name, self.left = spec, ctx, models, name, left or []
        self.chunks: list[MegatronModule] = list(models)
        self.optimizer: MegatronOptimizer | None = None
        self.base: dict[str, Any] | None = None
        self.asleep, self._evaluating = False, False

    @classmethod
    def build(  # what a model is built of, and what it is called
        cls,
        spec: ModelSpec,
        ctx: ParallelContext,
        *,
        optimizer: Optimizer | None = None,
        source: WeightSource | None = None,
        strict: bool = True,
        name: str = "",
        source_name: str | None = None,
        states: CheckpointReader | None = None,
    ) -> Engine:
        """Build the model on this layout. Weights are drawn only where none are loaded. All ranks call it.

        Args:
            optimizer: None builds no gradient buffers and no optimizer states.
            source: where the weights come from; None draws them.
            strict: refuse a source that lacks a tensor or has one too many; otherwise what does not fit is drawn. LoRA
                adapters are drawn where the source has none, and a value head where it is a language model.
            source_name: what the source calls the model; without it, as the engine is called.
            states: the checkpoint, of the source's weights, that the optimizer's states are taken from.

        Raises:
            CheckpointError, ConversionError: the source is not of this model, or holds no optimizer states.
            ConfigError: see build_chunks().
        """
        models = build_chunks(spec, ctx)
        left, prefix = Left([], set()), _prefix(name if source_name is None else source_name)
        if source is None:
            initialize_weights(models, ctx)
        else:
            new_adapters = spec.lora is not None and not any(is_adapter(key) for key in keys_of(source, prefix))
            new_head = draws_head(source, spec, prefix)

            def wanted(parameter: str) -> bool:
                return not (new_adapters and is_adapter(parameter)) and not (new_head and parameter == OUTPUT_NAME)

            unused = frozenset({OUTPUT_NAME} if spec.head == "hidden" else ())
            left = load_weights(
                source,
                models,
                ctx,
                strict=strict,
                prefix=prefix,
                wanted=wanted,
                unused=unused,
                states_follow=states is not None,
            )
            if any(prefix + key in keys_of(source, prefix) for key in unused):
                left.reasons.append(f"{OUTPUT_NAME}: an embedding model has no output layer")
            if new_head:
                size = f"{spec.value_heads} x {spec.arch.hidden_size}"
                left.reasons.append(
                    f"{OUTPUT_NAME}: the value head ({size}) is drawn, {source.folder} is a language model"
                )
            if left.parameters:
                initialize_weights(models, ctx, only=left.parameters)
        engine = cls(spec, ctx, models, name=name, left=left.reasons)
        if spec.lora is not None and source is not None and optimizer is not None:
            engine.base = base_record(source, ctx)
        if optimizer is not None:
            # The optimizer takes its fp32 master weights from the model, so it is built after the weights are there.
            engine.chunks = wrap_chunks(models, spec, ctx)
            engine.optimizer = build_optimizer(engine.chunks, spec, optimizer)
        if states is not None:
            engine._load_optimizer(states)
        # The weights that were copied into the buffers leave free segments of their sizes, in which activations fit badly:
        # of Baichuan-13B a rehearsal found 2 GiB lost for the whole run.
        ctx.platform.give_back_memory()
        return engine

    @property
    def model(self) -> LanguageModel:
        """The model of an engine whose rank holds all of it."""
        (model,) = self.models
        return model

    @property
    def required_optimizer(self) -> MegatronOptimizer:
        """The optimizer, of an engine that trains."""
        return required(self.optimizer, "optimizer")

    # Passes

    def forward_backward(self, batches: Iterator[Batch], objective: Objective | BatchObjective, count: int) -> Outputs:
        """Forward and backward over `count` micro-batches. No parameter changes.

        Afterwards the reduced gradients, divided by the objective's count over all ranks, lie with the optimizer's fp32
        weights (OwnedShard.main.grad).
        """
        self._be_awake()
        if self._evaluating:
            raise RuntimeError("the engine evaluates or generates: end that before a training step")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.required_optimizer.zero_grad()
        for router in self.routers:
            router.forget_recompute()
        outputs = self._run(batches, objective, count, forward_only=False)
        self._add_up_loads()
        outputs.overflow = self.required_optimizer.prepare_grads()
        grads = [s.main.grad for s in self.owned if s.trained and s.counts and s.main.grad is not None]
        if grads:
            outputs.grad_square = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        return outputs

    def update(self, *, clip: float, grad_norm: float) -> None:
        """Make the optimizer step that the last forward_backward() prepared.

        Args:
            clip: largest norm of the gradient, which is scaled down to it; 0 does not clip.
            grad_norm: of the gradient, over all ranks.
        """
        self._be_awake()
        scale, optimizer = clip / (grad_norm + 1e-6), self.required_optimizer
        if 0 < scale < 1:
            parameters = itertools.chain.from_iterable(part.get_parameters() for part in optimizer.chained_optimizers)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
        optimizer.step_with_ready_grads()
        for router in self.routers:
            router.update_bias()

    def _add_up_loads(self) -> None:
        """Each router's load of the step, over all ranks."""
        if not self.routers:
            return
        loads = torch.stack([router.take_load() for router in self.routers])
        dist.all_reduce(loads, group=self.ctx.groups.tp_dp_cp)
        for router, load in zip(self.routers, loads, strict=True):
            router.load = load

    @torch.no_grad()
    def forward(self, batches: Iterator[Batch], objective: Objective | BatchObjective, count: int) -> Outputs:
        """The same losses without a backward pass; call it inside `evaluation()`."""
        return self._run(batches, objective, count, forward_only=True)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it the model is in evaluation mode, and its parameters are whole on every rank.

        It may be entered again within it, which changes nothing; all ranks enter the outermost one together.
        """
        if self._evaluating:
            yield
            return
        gathers = self.optimizer is not None and self.chunks[0].ddp_config.overlap_param_gather
        for chunk in self.chunks:
            if gathers:
                chunk.disable_forward_pre_hook()
            chunk.eval()
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False
            for chunk in self.chunks:
                chunk.train()
                if gathers:
                    chunk.enable_forward_pre_hook()

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Within it the model computes what it computes without its LoRA adapters: the reference model of DPO, for one.

        For forward passes: a backward pass would find nothing to train. A model without adapters is not changed.
        """
        with adapters_off(self.models):
            yield

    @torch.no_grad()
    def vectors(self, batches: Iterator[Batch], objective: VectorObjective, count: int) -> Tensor | None:
        """The vectors of `count` micro-batches in their order, fp32 [d, h]; call it inside `evaluation()`.

        Returns:
            On all ranks of the last pipeline stage, those of this data-parallel rank's micro-batches; None on the others.
        """
        reports = self._reports(batches, VectorsOf(objective), count, forward_only=True)
        return torch.cat([report["samples"][VectorsOf.metric] for report in reports]) if reports else None

    def _run(
        self, batches: Iterator[Batch], objective: Objective | BatchObjective, count: int, *, forward_only: bool
    ) -> Outputs:
        if isinstance(objective, BatchObjective):
            whole = GlobalBatch(objective, list(itertools.islice(batches, count)), self.ctx)
            if forward_only:
                batches, learned = iter(whole.batches), ForwardPass(whole)
            else:
                batches, learned = self._first_pass(whole)
        else:
            learned = objective
        losses = self._reports(batches, learned, count, forward_only=forward_only)
        names = ("total", "count", *learned.sums)
        if not losses or self.ctx.tp_rank != 0:
            return Outputs(dict.fromkeys(names, 0.0))
        sums = {name: torch.stack([one["sums"][name] for one in losses]).sum(dtype=torch.float64) for name in names}
        names = dict.fromkeys(name for one in losses for name in one["samples"])
        samples = {n: torch.cat([one["samples"][n] for one in losses if n in one["samples"]]) for n in names}
        if self.ctx.row_cut is not None:
            samples = _whole_samples(samples, self.ctx.row_cut, learned)
        return Outputs({**sums}, samples)

    def _first_pass(self, whole: GlobalBatch) -> tuple[Iterator[Batch], SecondPass]:
        """The first pass of gradient caching; returns what the second one reads and learns.

        The first micro-batch needs none. Only the interleaved schedule, which wants a multiple of pp micro-batches, gets all.
        """
        batches, skipped = whole.batches, 0 if len(self.chunks) > 1 else 1
        rest, before = batches[skipped:], random_states(self.ctx.platform)
        known: list[Tensor] = []
        if rest:
            with torch.no_grad():
                reports = self._reports(iter(rest), VectorsOf(whole.objective), len(rest), forward_only=True)
            known = [report["samples"][VectorsOf.metric] for report in reports]
            for router in self.routers:
                router.forget_recompute()

        def again() -> Iterator[Batch]:
            for number, batch in enumerate(batches):
                if number == skipped:  # the second pass draws the same masks as the first
                    set_random_states(self.ctx.platform, before)
                yield batch

        return again(), SecondPass(whole, known)

    def _reports(
        self, batches: Iterator[Batch], objective: Objective, count: int, *, forward_only: bool
    ) -> list[Mapping[str, Any]]:
        """What `loss_function` reports of each micro-batch, on every rank of the last stage; empty on other stages."""
        cut = self.ctx.row_cut
        if cut is not None:
            _check_cut(objective, cut)
        # The schedule asks for exactly `count` micro-batches from each chunk's iterator.
        iterators = itertools.tee(itertools.islice(batches, count), len(self.chunks))
        several, (rows, length) = len(self.chunks) > 1, (self.spec.micro_batch_size, self.spec.seq_length)
        if objective.packed:
            rows, length = 1, rows * length
        return get_forward_backward_func()(
            forward_step_func=functools.partial(_forward, objective, cut),
            data_iterator=list(iterators) if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    # What it holds

    @functools.cached_property
    def routers(self) -> list[Router]:
        """Of this rank's layers of experts, in their order."""
        return [router for model in self.models for router in model.routers]

    @functools.cached_property
    def shared_experts(self) -> dist.ProcessGroup | None:
        """The ranks that have to make each pass together, as they hold experts of other copies; None where a copy has all.

        With ep 1, and with experts on the tensor-parallel ranks of a copy alone, a copy has all experts that it needs.
        """
        groups = self.ctx.groups
        if self.spec.arch.experts is None or groups.ep.size() == 1:
            return None
        ranks, same = set(dist.get_process_group_ranks(groups.ep)), set(dist.get_process_group_ranks(groups.tp))
        return None if ranks <= same else groups.ep

    @functools.cached_property
    def owned(self) -> list[OwnedShard]:
        """What this rank owns of the parameters, gradients and optimizer states."""
        return list(owned_shards(self.models, self.optimizer, self.ctx, _prefix(self.name)))

    def fragments(self) -> Iterator[Shard]:
        """What this rank saves: weights of frozen parameters; master weights and moments of trained ones.

        With LoRA the trained ones alone: the others are the base's.
        """
        self._be_awake()
        if self.optimizer is not None:
            ensure_moments(self.optimizer)
        for shard in self.owned:
            if self._is_saved(shard.name):
                yield from shard.fragments()

    def _be_awake(self) -> None:
        if self.asleep:
            raise RuntimeError("the engine is asleep: its states are in host memory; call TrainingMemory.wake() first")

    def _is_saved(self, name: str) -> bool:
        return self.spec.lora is None or not self.spec.is_frozen(name)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the fragments, JSON-able."""
        if self.optimizer is None:
            return {}
        state = {"adam_step": adam_step(self.optimizer), "loss_scaler": loss_scaler_state(self.optimizer)}
        if self.spec.lora is not None:
            state |= {"lora": self.spec.lora.model_dump(mode="json"), "base": self.base}
        return state

    def load(self, reader: CheckpointReader) -> None:
        """Take weights and optimizer states from a checkpoint of this model.

        Raises:
            CheckpointError: it is of another model, or holds no optimizer states.
        """
        prefix = _prefix(self.name)
        load_weights(reader, self.models, self.ctx, prefix=prefix, wanted=self._is_saved, states_follow=True)
        self._load_optimizer(reader)

    def _load_optimizer(self, reader: CheckpointReader) -> None:
        load_optimizer(reader, self.owned, self.optimizer, self.chunks, self.ctx, self.name)

    def state_bytes(self) -> int:
        """Bytes of this rank's weights, gradients and optimizer states, once the moments exist."""
        ensure_moments(self.optimizer)
        buffers = [buffer for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        total = sum(buffer.param_data.nbytes + buffer.grad_data.nbytes for buffer in buffers)
        total += sum(p.nbytes for model in self.models for p in model.parameters() if not p.requires_grad)
        for shard in (shard for shard in self.owned if shard.trained):
            total += sum(value.nbytes for value in shard.state.values() if isinstance(value, Tensor))
            if memory_of(shard.main) != memory_of(shard.parameter):
                total += shard.main.nbytes
        return total


def _check_cut(objective: Objective, cut: RowCut) -> None:
    if getattr(objective, "cut", None) is None:
        raise ConfigError(
            f"parallel.cp is {cut.size}, and the objective ({objective.metric}) takes whole rows: use cp 1, or an objective "
            "that says what it takes (Objective.cut)"
        )


def _whole_samples(samples: dict[str, Tensor], cut: RowCut, objective: Objective) -> dict[str, Tensor]:
    """Each row's numbers over its context-parallel ranks, on the first of them; all call it. Nothing waits for the device."""
    sums = [name for name, value in samples.items() if value.is_floating_point()]
    if sums and objective.cut == "tokens":
        added = torch.stack([samples[name].detach().double() for name in sums])  # [names, n]
        dist.all_reduce(added, group=cut.group)
        samples |= dict(zip(sums, added, strict=True))
    return samples if cut.rank == 0 else {}


def draws_head(source: WeightSource, spec: ModelSpec, prefix: str = "") -> bool:
    """Whether a model needs a value head that its source, a language model, does not have.

    Raises:
        CheckpointError: the source is a reward or value model with another head than the model has.
    """
    if spec.head == "hidden":
        return False
    found, wanted = value_heads_of(source, prefix), spec.value_heads if spec.head == "value" else 0
    if found and found != wanted:
        kind = f"the model has one of {wanted} outputs" if wanted else "the model is a language model"
        raise CheckpointError(f"{source.folder}: is a reward model, its value head has {found} outputs; {kind}")
    return bool(wanted) and not found


def engine_states(engines: Iterable[Engine]) -> dict[str, Any]:
    """The states of a checkpoint's engines: of the one without a name as they are, of the others under `engines`."""
    engines = list(engines)
    states = {engine.name: engine.state() for engine in engines}
    return {**states.pop("", {}), **({"engines": states} if states else {})}


def _prefix(name: str) -> str:
    return f"{name}/" if name else ""


def _forward(
    objective: Objective, cut: RowCut | None, batches: Iterator[Batch], chunk: MegatronModule
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Mapping[str, Any]]]]:
    """megatron-core's forward step. The one place where context-parallel ranks get their parts of a batch's rows."""
    model = unwrap(chunk)
    if not (model.pre_process or model.post_process or objective.packed or model.routers):
        return chunk(input_ids=None, position_ids=None, attention_mask=None), functools.partial(
            loss_function, objective, None
        )
    batch = next(batches)
    if model.routers:
        counts = objective.row_counts(batch)
        for router in model.routers:
            router.row_counts = counts
    if cut is None:
        return chunk(**objective.inputs(batch)), functools.partial(loss_function, objective, batch)
    part = batch.part_of(cut)
    loss = functools.partial(loss_function, objective, part)
    if objective.cut == "rows":
        loss = functools.partial(_loss_of_rows, objective, batch, cut)
    return chunk(**objective.inputs(part)), loss


def _loss_of_rows(
    objective: Objective, batch: Batch, cut: RowCut, output: Tensor
) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    """The loss of whole rows, put together from the outputs of all context-parallel ranks, of which the first counts."""
    rows, length = batch.tokens.shape
    whole = cut.whole(output.reshape(rows, length // cut.size, *output.shape[2:]))  # [b, s, ...]
    total, count, reported = loss_function(objective, batch, whole.flatten(0, 1)[None] if objective.packed else whole)
    if cut.rank:
        reported = {**reported, "sums": {name: torch.zeros_like(value) for name, value in reported["sums"].items()}}
        count = torch.zeros_like(count)
    return total, count, reported


def loss_function(
    objective: Objective, batch: Batch | None, output: Tensor
) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    """megatron-core's loss function: it divides the gradients by the count of the whole global batch."""
    loss = objective.loss(output, required(batch, "the last stage's batch"))
    # The schedule scales the first value in place after this returns, so what is reported is a copy.
    sums = {"total": loss.total.detach().clone(), "count": loss.count, **loss.sums}
    return loss.total, loss.count.to(torch.int), {"sums": sums, "samples": loss.samples}
