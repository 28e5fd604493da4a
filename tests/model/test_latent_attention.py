"""Latent attention, and norms of q and k over whole projections: every layout learns what one process does."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from flagscale_like.arch import Experts, ModelArch
from flagscale_like.config import Lora
from tests.harness import run_ranks, tiny_config
from tests.model.test_experts import LENGTH, ROWS, learn_all

YARN = {
    "scaling": {
        "kind": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
}
LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
EXPERTS: dict[str, Any] = {
    "count": 4,
    "top_k": 2,
    "ffn_hidden_size": 48,
    "dense_layers": 1,
    "shared_ffn_hidden_size": 32,
}
KINDS = {
    "latent": {"latent_attention": {**LATENT, "q_lora_rank": 24}, "num_query_groups": 4, "position": YARN},
    "whole q": {"latent_attention": LATENT, "num_query_groups": 4},
    "with experts": {"latent_attention": LATENT, "num_query_groups": 4, "experts": EXPERTS},
    "norm": {"qk_norm": True, "qk_norm_over": "projection"},
}
SP = {"tp": 2, "sp": True}
SELECTIVE, FULL = ({"train__recompute": how} for how in ("selective", "full"))
# (layout on four ranks, kind, packed, changes)
RUNS = [
    ({"tp": 2}, "latent", False, {}),
    ({"tp": 2}, "norm", False, {}),
    (SP, "latent", True, SELECTIVE),
    (SP, "latent", False, {}),
    (SP, "whole q", False, FULL),
    (SP, "norm", True, FULL),
    ({**SP, "ep": 2}, "with experts", False, {}),
    ({"pp": 2}, "latent", False, SELECTIVE),
    ({"pp": 2, "ep": 2}, "with experts", False, {}),
    ({"cp": 2}, "latent", False, {}),
    ({"cp": 2}, "latent", True, SELECTIVE),
    ({"cp": 2, "cp_kind": "a2a"}, "latent", False, {}),
    ({"cp": 2}, "norm", False, {}),
]


def config_of(folder, kind, parallel, changes):
    fixed = {"train__global_batch_size": ROWS, "train__seq_length": LENGTH, "optimizer__lr": 1e-3}
    model = {f"model__{name}": value for name, value in KINDS[kind].items()}
    return tiny_config(folder, parallel=parallel, model__init_std=0.1, **fixed, **model, **changes)


def test_every_layout_learns_what_one_process_learns(tmp_path):
    alone = sorted({(kind, packed) for _, kind, packed, _ in RUNS})
    (expected,) = run_ranks(1, learn_all, [(config_of(tmp_path, kind, {}, {}), packed) for kind, packed in alone])
    expected = dict(zip(alone, expected, strict=True))
    runs = [(config_of(tmp_path, kind, parallel, more), packed) for parallel, kind, packed, more in RUNS]
    for results in run_ranks(4, learn_all, runs, timeout_s=300):
        for run, (steps, _) in zip(RUNS, results, strict=True):
            one, _ = expected[run[1], run[2]]
            np.testing.assert_allclose(steps, one, rtol=1e-5, err_msg=str(run))


SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "vocab_size": 250,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_attention": {**LATENT, "qk_rope_head_dim": 7}}, r"qk_rope_head_dim \(7\) must be even"),
        (
            {"latent_attention": {**LATENT, "v_head_dim": 21}},
            r"v_head_dim \(21\) exceeds the channels of a head of q \(20",
        ),
        (
            {"latent_attention": LATENT, "num_query_groups": 2},
            r"has no num_query_groups \(2\) below num_attention_heads",
        ),
        ({"latent_attention": LATENT, "qk_norm": True, "qkv_bias": True}, "has no qkv_bias, qk_norm: leave it out"),
        ({"latent_attention": LATENT, "sliding_window": 4}, "has no sliding_window"),
        ({"latent_attention": LATENT, "position": {"kind": "alibi"}}, "has no position.kind alibi"),
        ({"latent_attention": LATENT, "head_dim": 16}, r"head_dim \(16\) follows from latent_attention"),
        ({"qk_norm_over": "projection"}, "qk_norm_over projection needs qk_norm true"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        ModelArch(**SHAPE, **change)


def test_a_projection_that_every_rank_has_whole_gets_no_adapter():
    arch = ModelArch(**SHAPE, latent_attention=LATENT)
    Lora(rank=4, targets=("linear_kv_up_proj", "linear_q_proj", "linear_proj")).check(arch)
    with pytest.raises(
        ValueError, match="linear_kv_down_proj has no adapters, because tensor parallelism does not cut it"
    ):
        Lora(rank=4, targets=("linear_kv_down_proj",)).check(arch)


def test_mup_has_no_rule_for_latent_widths(tmp_path):
    model = {"model__latent_attention": LATENT, "model__num_query_groups": 4}
    with pytest.raises(ValidationError, match=r"init\.mup has no rule for model\.latent_attention"):
        tiny_config(tmp_path, init__mup={"base_hidden_size": 32}, **model)


def test_flops_are_six_a_parameter_and_token_and_attention_on_top():
    arch = ModelArch(**SHAPE, latent_attention={**LATENT, "q_lora_rank": 24}, experts=Experts(**EXPERTS))
    s, n, d, v = 128, 4, 20, 16
    router = 4 * 64
    per_layer = 24 * (64 + n * d) + 64 * 28 + 20 * n * (12 + v) + n * v * 64
    matrices = 2 * per_layer + 3 * 64 * 96 + (2 * 48 + 32) * 3 * 64 + router + 64 * arch.padded_vocab_size()
    assert arch.flops_per_token(s) == 6 * matrices + 6 * 2 * n * (d + v) * s
