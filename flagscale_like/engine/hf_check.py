"""The proof that an exported folder is the model: transformers, or a second reading, computes the same logits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.arch import ModelArch, is_adapter
from flagscale_like.checkpoint.adapters import AdaptedWeights
from flagscale_like.checkpoint.format import Shapes, is_embedder, value_heads_of
from flagscale_like.checkpoint.hf import ExportPlan
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.peft_folder import PeftFolder
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConversionError
from flagscale_like.families.weight_map import Exact
from flagscale_like.model.build import LanguageModel, named_shards
from flagscale_like.model.spec import Head, ModelSpec
from flagscale_like.runtime.parallel import ParallelContext


def transformers_ships(model_type: str) -> bool:
    """Whether plain transformers, without code from the folder, knows the model."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


@torch.no_grad()
def compare_logits(plan: ExportPlan, folder: Path, ctx: ParallelContext, *, tolerance: float = 1e-4) -> float:
    """Run the native model and transformers' on the same random tokens, both in fp32 from weights rounded alike.

    Of a reward model the scores are compared, of an embedding model the hidden states. A family that transformers does not
    ship is compared with the native model read back from the folder.

    Returns:
        The largest difference of a logit, over the largest logit.

    Raises:
        ConversionError: it exceeds `tolerance`, or transformers cannot load the folder.
    """
    source = plan.source
    model = Engine.build(spec_of(source), ctx, source=source).model.eval()
    if plan.normalize_head:
        model.output_layer.weight.data = F.normalize(model.output_layer.weight.data, dim=-1)
        model.output_layer.normalize = False
    if plan.dtype is not None:
        exact = {rule.core for group in plan.groups for rule in group if isinstance(rule, Exact)}
        for name, parameter in named_shards(model).items():
            if name not in exact:
                parameter.data = parameter.data.to(plan.dtype).float()
    ids = _random_tokens(model.arch, ctx)
    ours = _logits(model, ids)
    del model
    return _compared(ours, _logits_of_folder(folder, plan.family.model_type, ids, ctx), folder, tolerance)


@torch.no_grad()
def change_by_merging(adapted: AdaptedWeights, plan: ExportPlan, folder: Path, ctx: ParallelContext) -> float:
    """How far the exported model is from the base with its adapters beside it, in fp32, as compare_logits() measures.

    In 16 bits most of it is the rounding of the merged weights.
    """
    ids = _random_tokens(adapted.arch, ctx)
    ours = _logits_with_adapters(adapted, ids, ctx, head=spec_of(adapted).head)
    return _difference(ours, _logits_of_folder(folder, plan.family.model_type, ids, ctx))


@torch.no_grad()
def compare_adapter(
    adapted: AdaptedWeights, folder: Path, ctx: ParallelContext, *, dtype: torch.dtype, tolerance: float = 1e-4
) -> tuple[float, bool]:
    """Compare the native model and adapters with peft's reading of the exported adapter, in fp32.

    Without peft, or a base that transformers loads, the adapter is read back and compared natively.

    Args:
        dtype: that the adapter was exported in. The native adapters are rounded alike.

    Returns:
        The largest difference of a logit, over the largest logit; whether peft computed the others.

    Raises:
        ConversionError: it exceeds `tolerance`, or peft cannot load the folder.
    """
    ids = _random_tokens(adapted.arch, ctx)
    ours = _logits_with_adapters(adapted, ids, ctx, dtype)
    base = adapted.base
    by_peft = isinstance(base, HfFolder) and transformers_ships(base.family.model_type) and bool(find_spec("peft"))
    if by_peft:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(_transformers_model(base.folder), str(folder))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConversionError(f"{folder}: peft cannot load it: {error}") from None
        theirs = model.to(ctx.platform.device).eval()(ids).logits.float()
    else:
        theirs = _logits_with_adapters(AdaptedWeights(base, PeftFolder(folder, base.arch)), ids, ctx)
    return _compared(ours, theirs, folder, tolerance), by_peft


def _random_tokens(arch: ModelArch, ctx: ParallelContext, tokens: int = 64) -> Tensor:
    length = min(tokens, arch.longest_sequence or tokens)
    ids = torch.randint(0, arch.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return ids.to(ctx.platform.device)


def spec_of(source: Shapes) -> ModelSpec:
    """The model that a source's weights are of: a language model, an embedding model, or one with a value head."""
    if is_embedder(source):
        return ModelSpec(arch=source.arch, head="hidden")
    heads = value_heads_of(source)
    return ModelSpec(arch=source.arch, head="value" if heads else "language_model", value_heads=heads or 1)


def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits, the scores of a value head, or the hidden states, of each token."""
    if model.spec.head == "hidden":
        return model(ids, None, None).float()
    if model.spec.head == "value":
        return model(ids, None, None).view(*ids.shape, -1)
    return model(ids, None, None)[..., : model.arch.vocab_size].float()


def _logits_with_adapters(
    adapted: AdaptedWeights,
    ids: Tensor,
    ctx: ParallelContext,
    dtype: torch.dtype = torch.float32,
    *,
    head: Head = "language_model",
) -> Tensor:
    """Of the base and its adapters, these rounded to `dtype`."""
    spec = ModelSpec(arch=adapted.arch, head=head, lora=adapted.lora)
    model = Engine.build(spec, ctx, source=adapted).model.eval()
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype).float()
    return _logits(model, ids)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _compared(ours: Tensor, theirs: Tensor, folder: Path, tolerance: float) -> float:
    difference = _difference(ours, theirs)
    if not difference <= tolerance:
        raise ConversionError(
            f"{folder}: its logits differ from the native model's by {difference:.2e} of the largest "
            f"(allowed {tolerance:.0e}): the export is not usable"
        )
    return difference


def _logits_of_folder(folder: Path, model_type: str, ids: Tensor, ctx: ParallelContext) -> Tensor:
    if not transformers_ships(model_type):
        source = HfFolder(folder)
        return _logits(Engine.build(spec_of(source), ctx, source=source).model.eval(), ids)
    model = _transformers_model(folder).to(ctx.platform.device).eval()
    if HfFolder(folder).embedder:
        return model(ids).last_hidden_state.float()
    if hasattr(model, "score"):  # transformers gives a sequence's last score; here, every token's
        return model.score(model.base_model(ids).last_hidden_state).float()
    return model(ids).logits.float()


def _transformers_model(folder: Path) -> Any:
    """transformers' model of a folder, in fp32.

    Raises:
        ConversionError: transformers cannot load it.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        ours = HfFolder(folder)
        kind = AutoModelForSequenceClassification if ours.value_heads else AutoModelForCausalLM
        kind = AutoModel if ours.embedder else kind
        return kind.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{folder}: transformers cannot load it: {error}") from None
