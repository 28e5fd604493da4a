"""The proof that an exported folder is the model: transformers, or a second reading, computes the same logits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import ExportPlan
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConversionError
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import ParallelContext


def transformers_ships(model_type: str) -> bool:
    """Whether plain transformers, without code from the folder, knows the model."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


@torch.no_grad()
def compare_logits(
    reader: CheckpointReader,
    plan: ExportPlan,
    folder: Path,
    ctx: ParallelContext,
    *,
    tolerance: float = 1e-4,
    tokens: int = 64,
) -> float:
    """Run the native model and transformers' on the same random tokens, both in fp32 from weights rounded alike.

    A family that transformers does not ship is compared with the native model read back from the folder.

    Returns:
        The largest difference of a logit, over the largest logit.

    Raises:
        ConversionError: it exceeds `tolerance`, or transformers cannot load the folder.
    """
    model = Engine.build(ModelSpec(arch=reader.arch), ctx, source=reader).model.eval()
    if plan.normalize_head:
        model.output_layer.weight.data = F.normalize(model.output_layer.weight.data, dim=-1)
        model.output_layer.normalize = False
    if plan.dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(plan.dtype).float()
    length = min(tokens, model.arch.longest_sequence or tokens)
    ids = torch.randint(0, model.arch.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(ctx.platform.device)
    ours = model(ids, None, None)[..., : model.arch.vocab_size].float()
    del model
    theirs = _logits_of_folder(folder, plan.family.model_type, ids, ctx)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= tolerance:
        raise ConversionError(
            f"{folder}: its logits differ from the native model's by {difference:.2e} of the largest "
            f"(allowed {tolerance:.0e}): the export is not usable"
        )
    return difference


def _logits_of_folder(folder: Path, model_type: str, ids: Tensor, ctx: ParallelContext) -> Tensor:
    if not transformers_ships(model_type):
        source = HfFolder(folder)
        again = Engine.build(ModelSpec(arch=source.arch), ctx, source=source).model.eval()
        return again(ids, None, None)[..., : again.arch.vocab_size].float()
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{folder}: transformers cannot load it: {error}") from None
    return model.to(ctx.platform.device).eval()(ids).logits.float()
