"""One step of generation through this rank's part of the model: pipeline stages in turn, and the logits that are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from flagscale_like.engine.engine import Engine
from flagscale_like.generation.sampling import Draws, draw
from flagscale_like.model.build import LanguageModel
from flagscale_like.model.kv_cache import CachedStep
from flagscale_like.model.layer_step import LayerStep


class StepForward:
    """Computes steps on an engine's model. All ranks that share the model call it alike."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ctx, self.models = engine, engine.ctx, engine.models
        self.pipeline = self.ctx.groups.pp
        self.stages, self.stage = self.pipeline.size(), self.pipeline.rank()
        self.vocab_size = engine.spec.arch.vocab_size
        self.layers: list[list[LayerStep]] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it the model computes steps: in evaluation mode, each tensor-parallel rank with all tokens."""
        parallel = [model for model in self.models if model.config.sequence_parallel]
        with self.engine.evaluation():
            for model in parallel:  # one token has no parts
                set_model_to_sequence_parallel(model, False)
            self.layers = [[LayerStep(layer) for layer in model.decoder.layers] for model in self.models]
            try:
                yield
            finally:
                self.layers = []
                for model in parallel:
                    set_model_to_sequence_parallel(model, True)

    @torch.no_grad()
    def hidden(self, tokens: Sequence[int], step: CachedStep) -> Tensor | None:
        """The hidden states [t, h] of a step's tokens after the last layer; None on the other stages than the last."""
        device, hidden = self.ctx.platform.device, None
        for number, model in enumerate(self.models):
            if model.pre_process:
                ids = torch.tensor([tokens], device="cpu").to(device, non_blocking=True)
                hidden = model.embedding(input_ids=ids, position_ids=None)[:, 0]
            else:
                hidden = self._receive(len(tokens), model)
            for layer in self.layers[number]:
                hidden = layer(hidden, step)
            if model.post_process:
                hidden = model.decoder.final_layernorm(hidden)
            else:
                dist.send(hidden.contiguous(), self._rank_of(self.stage + 1), group=self.pipeline)
                hidden = None
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor, wanted: Sequence[int]) -> Tensor:
        """fp32 [n, vocabulary] after the tokens `wanted`, on the last stage, the same bits on all tensor-parallel ranks."""
        model = self.models[-1]
        if list(wanted) != list(range(len(hidden))):
            hidden = hidden[torch.tensor(wanted, device=hidden.device)]
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        part = model.output_layer.finish(hidden[:, None], None, weight)[0]  # [n, v/tp]
        group = self.ctx.groups.tp
        if group.size() > 1:
            parts = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(parts, part.contiguous(), group=group)
            part = torch.cat(parts, -1)
        return part[:, : self.vocab_size].float()

    def draw(self, logits: Tensor | None, draws: Draws) -> list[list[float]]:
        """Draw of each row; on all stages: tokens, log-probabilities, raw log-probabilities (see sampling.draw)."""
        if logits is not None:
            found = draw(logits, draws)
        else:
            found = torch.empty(3, len(draws.samplings), dtype=torch.float64, device=self.ctx.platform.device)
        if self.stages > 1:
            dist.broadcast(found, self._rank_of(self.stages - 1), group=self.pipeline)
        return found.tolist()

    def _receive(self, count: int, model: LanguageModel) -> Tensor:
        size = (count, model.config.hidden_size)
        hidden = torch.empty(size, dtype=model.config.params_dtype, device=self.ctx.platform.device)
        dist.recv(hidden, self._rank_of(self.stage - 1), group=self.pipeline)
        return hidden

    def _rank_of(self, stage: int) -> int:
        return dist.get_global_rank(self.pipeline, stage % self.stages)
