"""OwnEngine: the texts that it draws, against full-context passes of the model, transformers, and other layouts."""

import pytest
import torch

from flagscale_like.engine.engine import Engine
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import run_ranks, tiny_config

EXPERTS = {"model__experts": {"count": 4, "top_k": 2, "ffn_hidden_size": 48}}
KINDS = {
    "rope": {},
    "alibi": {"model__position": {"kind": "alibi"}},
    "nlpe": {"model__position": {"kind": "nlpe", "threshold": 9}},
    "nlpe compressed": {"model__position": {"kind": "nlpe", "threshold": 9, "far": "compressed"}},
    "window": {"model__sliding_window": 7, "model__qk_norm": True, "model__qkv_bias": True},
    "experts": EXPERTS,
    "latent": {
        "model__num_query_groups": 4,
        "model__latent_attention": {
            "kv_lora_rank": 24,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
        },
    },
}


def sharpened(engine):
    """Weights so large that logits differ, as those of a trained model do."""
    with torch.no_grad():
        for model in engine.models:
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(4)
    return engine


def some_prompts(count=5, longest=20, vocab=250):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def by_name(rollouts):
    return {(rollout.prompt, rollout.sample): rollout for rollout in rollouts}


def full_context(model, ids, vocab=250):
    """fp32 [s, v], the logits of a training-style forward pass."""
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), None, None)[0, :, :vocab].float()


def checked_against_full_context(changes):
    """How far greedy texts and log-probabilities of sampled ones are from full-context passes, and what differs by batch."""
    config = tiny_config("unused", train__seq_length=128, **changes)
    with parallel_context(config.parallel) as ctx:
        engine = sharpened(Engine.build(ModelSpec.of(config), ctx))
        own, prompts = OwnEngine(engine, rows=3, most_tokens=11), some_prompts()
        greedy = by_name(own.generate([Prompt(p, i) for i, p in enumerate(prompts)], Sampling(12, temperature=0)))
        wrong = []
        for (number, _), rollout in greedy.items():
            whole = full_context(engine.model, prompts[number] + rollout.ids)
            if whole.argmax(-1)[len(prompts[number]) - 1 : -1].tolist() != rollout.ids:
                wrong.append(number)
        asked = [Prompt(p, i, samples=4) for i, p in enumerate(prompts)]
        sampling = Sampling(9, temperature=0.8, top_p=0.9, seed=5)
        engine.model.train()
        sampled = by_name(own.generate(asked, sampling))
        assert engine.model.training
        worst = 0.0
        for (number, _), rollout in sampled.items():
            logits = full_context(engine.model, prompts[number] + rollout.ids) / 0.8
            taken = logits.log_softmax(-1)[len(prompts[number]) - 1 : -1].gather(-1, torch.tensor(rollout.ids)[:, None])
            worst = max(worst, (taken[:, 0] - torch.tensor(rollout.raw_logprobs)).abs().max().item())
        others = by_name(OwnEngine(engine, rows=16).generate(asked[::-1], sampling))
        different = [name for name in sampled if sampled[name].ids != others[name].ids]
        texts = {tuple(rollout.ids) for rollout in sampled.values()}
        return wrong, worst, different, len(sampled), len(texts), own.figures.prompt_tokens - sum(map(len, prompts)) * 2


def every_kind():
    return {name: checked_against_full_context(changes) for name, changes in KINDS.items()}


def test_texts_and_log_probabilities_are_those_of_full_context_passes():
    (found,) = run_ranks(1, every_kind)
    for name, (wrong, worst, different, count, texts, recomputed) in found.items():
        assert (name, wrong, different, count, recomputed) == (name, [], [], 20, 0)
        assert worst < 2e-5, name
        assert texts > 14, name


def of_layout(layout, changes):
    config = tiny_config("unused", parallel=layout, train__seq_length=128, **changes)
    with parallel_context(config.parallel) as ctx:
        engine = sharpened(Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer))
        own = OwnEngine(engine, rows=4, most_tokens=11)
        asked = [Prompt(p, i, samples=2) for i, p in enumerate(some_prompts())]
        # With experts over data-parallel ranks these have texts of their own, and not as many.
        asked = asked[: len(asked) - 3 * (ctx.replica_rank if config.model.experts else 0)]
        found = [
            (r.prompt, r.sample, r.ids, r.logprobs)
            for r in own.generate(asked, Sampling(8, temperature=0.9, top_k=40, seed=3))
        ]
        return found, [model.training for model in engine.models], engine.models[0].config.sequence_parallel


LAYOUTS = [
    ({"tp": 2, "sp": True, "pp": 2}, {}),
    ({"pp": 2, "vpp": 2}, {}),
    (
        {"tp": 2, "cp": 2, "cp_kind": "a2a", "sp": True},
        {"model__position": {"kind": "alibi"}, "model__num_query_groups": 4},
    ),
    ({"tp": 2, "sp": True, "ep": 4}, EXPERTS),
]


def every_layout():
    return [of_layout(*layout) for layout in LAYOUTS]


def on_one_rank():
    return [of_layout({}, changes) for _, changes in LAYOUTS]


def test_every_layout_draws_the_texts_of_one_process():
    (alone,) = run_ranks(1, on_one_rank)
    ranks = run_ranks(4, every_layout)
    for number, (layout, _) in enumerate(LAYOUTS):
        one = {entry[:2]: entry[2:] for entry in alone[number][0]}
        for rank, found in enumerate(ranks):
            drawn, training, sequence_parallel = found[number]
            assert all(training), layout
            assert sequence_parallel == layout.get("sp", False), layout
            assert len(drawn) == (4 if layout.get("ep") and rank >= 2 else 10), (layout, rank)
            for prompt, sample, ids, logprobs in drawn:
                assert ids == one[prompt, sample][0], (layout, rank, prompt, sample)
                assert logprobs == pytest.approx(one[prompt, sample][1], abs=2e-5), (layout, rank)
        sharing = ranks[:2] if layout.get("tp") else ranks[::2]  # ranks 0 and 1 share a model over tp; 0 and 2 over pp
        assert sharing[0][number][0] == sharing[1][number][0], layout
