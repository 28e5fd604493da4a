"""Weights from the layout of training to a whole model on each rank, bit by bit, and back to sleep."""

import numpy as np
import pytest
import torch

from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError
from flagscale_like.generation import refit
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.refit import RefitEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.model.build import named_shards
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.generation.test_engine import EXPERTS, sharpened, some_prompts
from tests.harness import run_ranks, tiny_config

MORE = EXPERTS["model__experts"] | {"score": "sigmoid", "bias": True}
LAYOUTS = [
    ({"tp": 2, "sp": True, "pp": 2}, {"model__tie_embeddings": True, "model__vocab_size": 500}),
    ({"pp": 2, "vpp": 2}, {"lora": {"rank": 4}}),
    ({"tp": 2, "sp": True, "ep": 4}, {"model__experts": MORE, "model__qk_norm": True}),
]
SAMPLING = Sampling(8, temperature=0.9, top_k=40, seed=3)


def trained(layout, changes, ctx):
    config = tiny_config("unused", parallel=layout, train__seq_length=128, **changes)
    return sharpened(Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer))


def weights_of(engine):
    return {name: parameter.detach().clone().numpy() for name, parameter in named_shards(engine.model).items()}


def drawn(own):
    asked = [Prompt(p, i, samples=2) for i, p in enumerate(some_prompts())]
    return [(r.prompt, r.sample, r.ids, r.version) for r in own.generate(asked, SAMPLING)]


def alone():
    found = []
    for _, changes in LAYOUTS:
        config = tiny_config("unused", **changes)
        with parallel_context(config.parallel) as ctx:
            engine = trained({}, changes, ctx)
            found.append((weights_of(engine), drawn(OwnEngine(engine, rows=4))))
    return found


def refitted():
    found = []
    for layout, changes in LAYOUTS:
        config = tiny_config("unused", parallel=layout, **changes)
        with parallel_context(config.parallel) as ctx:
            engine = trained(layout, changes, ctx)
            own = RefitEngine(engine, rows=4)
            refit.EXCHANGE_STEPS = 2
            with pytest.raises(ConfigError, match="has no weights"):
                own.generate([], SAMPLING)
            rounds = [str(dtype) for dtype, _ in own.refit.rounds]
            own.load((), 7)
            first = weights_of(own.engine), drawn(own)
            texts = own.generate([Prompt(p, i, samples=9) for i, p in enumerate(some_prompts())], SAMPLING)
            steps = own.figures.steps, next(texts), own.figures.steps, len(list(texts)), own.figures.steps
            assert steps[0] < steps[2] < steps[4], "a rollout comes before the last one has ended"
            own.sleep()
            asleep = sum(p.untyped_storage().nbytes() for p in own.engine.model.parameters()) + own.cache.nbytes
            with torch.no_grad():
                for model in engine.models:
                    for parameter in model.parameters():
                        parameter.mul_(2)
            own.load((), 8)
            doubled = weights_of(own.engine)
            again = all(np.array_equal(doubled[name], 2 * tensor) for name, tensor in first[0].items())
            found.append((*first, asleep, again, rounds, own.refit.received))
    return found


def test_every_rank_gets_the_weights_bit_by_bit_and_the_texts_of_one_process():
    (one,) = run_ranks(1, alone)
    ranks = run_ranks(4, refitted)
    for number, (layout, _) in enumerate(LAYOUTS):
        weights, texts = one[number]
        expected = sorted((prompt, sample, ids, 7) for prompt, sample, ids, _ in texts)
        for rank, found in enumerate(ranks):
            own, drawn, asleep, doubled, rounds, received = found[number]
            assert own.keys() == weights.keys(), layout
            different = [name for name in weights if not _same(own[name], weights[name])]
            assert not different, (layout, rank)
            assert sorted(drawn) == expected, (layout, rank)
            assert asleep == 0, layout
            assert doubled, layout
            assert rounds == ["torch.float32"], layout  # one all-to-all: the weights fit the buffer
            assert 0 < received < sum(tensor.size for tensor in weights.values()), layout


def _same(ours, theirs):
    """Equal but for the rows that pad the vocabulary, of which layouts have different numbers."""
    rows = min(len(ours), len(theirs))
    return np.array_equal(ours[:rows], theirs[:rows]) and not ours[rows:].any() and not theirs[rows:].any()
