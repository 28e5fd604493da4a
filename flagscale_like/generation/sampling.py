"""Drawing tokens from logits: temperature, top-k, top-p, and random numbers that depend on the text alone.

The random number of a token is a function of the seed, the prompt's number, the sample's number and the token's position in
the text. A text is therefore the same whatever else is in the batch, but for the rounding of the logits, which matrix
products of another size may change in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flagscale_like.errors import ConfigError
from flagscale_like.generation.rollout import Sampling

LOWEST = 1e-4  # temperature: logits over a smaller one may have no place in fp32
FEW = 1024  # likeliest tokens among which top-p is looked for before all are sorted
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Refuse what cannot be drawn.

    Raises:
        ConfigError: a number is out of its range.
    """
    ranges = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (
            not sampling.temperature or LOWEST <= sampling.temperature < float("inf"),
            f"0, or a number of at least {LOWEST:g}",
        ),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "at least 0 (0: all tokens)"),
        "seed": (0 <= sampling.seed < 2**64, "at least 0 and below 2^64"),
        "stop": (all(0 <= token < vocab_size for token in sampling.stop), f"tokens below {vocab_size}"),
        "stop_strings": (
            all(one and one.encode("utf-8", "replace").decode() == one for one in sampling.stop_strings),
            "texts that are not empty, of whole characters",
        ),
    }
    for name, (holds, allowed) in ranges.items():
        if not holds:
            raise ConfigError(f"sampling: {name} is {getattr(sampling, name)!r}; give {allowed}")


def text_key(seed: int, prompt: int, sample: int) -> int:
    """The state from which a text's random numbers are counted."""
    key = np.zeros(1, dtype=np.uint64)
    for number in (seed, prompt, sample):
        key = _mix(key + GOLDEN + np.uint64(number % 2**64))
    return int(key[0])


def uniforms(keys: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """float64 [n] in [0, 1): of each text the number of a position, from 0.

    SplitMix64 (Steele et al. 2014): number i of the generator whose state begins at the key.
    """
    steps = np.asarray(positions, dtype=np.uint64) + np.uint64(1)
    return (_mix(np.asarray(keys, dtype=np.uint64) + steps * GOLDEN) >> SHIFTS[3]) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> SHIFTS[0])) * FACTORS[0]
    z = (z ^ (z >> SHIFTS[1])) * FACTORS[1]
    return z ^ (z >> SHIFTS[2])


@dataclass
class Draws:
    """What is asked of each row of logits.

    Attributes:
        samplings: how each is drawn.
        random: float64 [n] in [0, 1).
    """

    samplings: Sequence[Sampling]
    random: np.ndarray


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """Draw a token of each row.

    At temperature 0 the likeliest token is taken, and the log-probabilities are those at temperature 1.

    Args:
        logits: [n, v], fp32. They are overwritten.

    Returns:
        float64 [3, n]: the token; its log-probability after temperature, top-k and top-p; at the temperature alone.
    """
    samplings = draws.samplings
    if any(s.temperature not in (0, 1) for s in samplings):
        logits /= logits.new_tensor([s.temperature or 1.0 for s in samplings])[:, None]
    logprobs = logits.log_softmax(-1)
    found = torch.empty(3, len(samplings), dtype=torch.float64, device=logits.device)
    kinds = [0 if s.temperature == 0 else 2 if s.top_k or s.top_p < 1 else 1 for s in samplings]
    for kind, pick in enumerate((_likeliest, _any, _likely)):
        rows = [row for row, of in enumerate(kinds) if of == kind]
        if len(rows) == len(samplings):
            return pick(logprobs, samplings, torch.from_numpy(draws.random).to(logits.device))
        if rows:
            index = torch.tensor(rows, device=logits.device)
            random = torch.from_numpy(draws.random[rows]).to(logits.device)
            found[:, index] = pick(logprobs[index], [samplings[row] for row in rows], random)
    return found


def _likeliest(logprobs: Tensor, _: Sequence[Sampling], __: Tensor) -> Tensor:
    value, token = logprobs.max(-1)
    return torch.stack((token.double(), value.double(), value.double()))


def _any(logprobs: Tensor, _: Sequence[Sampling], random: Tensor) -> Tensor:
    """Among all tokens, by the inverse of their cumulative probabilities."""
    token = _invert(logprobs.exp().double(), random)
    value = logprobs.gather(1, token)[:, 0].double()
    return torch.stack((token[:, 0].double(), value, value))


def _likely(logprobs: Tensor, samplings: Sequence[Sampling], random: Tensor) -> Tensor:
    """Among the likeliest: the first top_k, and of these the first that have top_p of their probability together."""
    device, vocab = logprobs.device, logprobs.shape[1]
    top_k = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)[:, None]
    count = min(vocab, max(s.top_k or FEW for s in samplings))
    while True:
        values, order = logprobs.topk(count, dim=-1)
        ranks = torch.arange(count, device=device)
        p = values.exp().double().masked_fill(ranks >= top_k, 0.0)
        total = torch.where(top_k <= count, p.sum(-1, keepdim=True), 1.0)
        before = p.cumsum(-1) - p
        # What lies behind the likeliest that were looked at matters to nobody.
        if count == vocab or bool(((before + p)[:, -1:] >= top_p * total).logical_or(top_k <= count).all()):
            break
        count = vocab
    p = p.masked_fill(before >= top_p * total, 0.0)
    picked = _invert(p, random)
    token, raw = order.gather(1, picked)[:, 0], values.gather(1, picked)[:, 0].double()
    return torch.stack((token.double(), (p.gather(1, picked)[:, 0] / p.sum(-1)).log(), raw))


def _invert(p: Tensor, random: Tensor) -> Tensor:
    """[n, 1]: where the cumulative sum of p [n, v] first exceeds `random` times the whole."""
    sums = p.cumsum(-1)
    return torch.searchsorted(sums, random[:, None] * sums[:, -1:], right=True).clamp_(max=p.shape[1] - 1)
