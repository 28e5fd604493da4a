"""Sampling from a native model, by running the whole context for every token: simple, and as right as training."""

from __future__ import annotations

from collections.abc import Collection

import torch

from flagscale_like.model.build import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Collection[int | None] = (),
    seed: int = 0,
) -> list[int]:
    """Continue a prompt.

    Args:
        prompt: token ids, at least one.
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability (Holtzman et al. 2020).
        top_k: sample among so many of the likeliest tokens (Fan et al. 2018); 0: among all.
        stop: tokens that end the text; they are not returned.

    Returns:
        The new token ids.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids, window = list(prompt), model.arch.longest_sequence  # 0: all of them
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids[-window:]], device=device), None, None)[0, -1, : model.arch.vocab_size]
        token = _pick(logits.float().cpu(), temperature, top_p, top_k, generator)
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _pick(logits: torch.Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    if top_k:
        probabilities, order = probabilities[:top_k] / probabilities[:top_k].sum(), order[:top_k]
    kept = probabilities.cumsum(-1) - probabilities < top_p
    return int(order[torch.multinomial(probabilities * kept, 1, generator=generator)])
