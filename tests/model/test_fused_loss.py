"""The fused output layer and loss in the model: the same losses and gradients as the plain path, in less memory."""

import pytest

import flagscale_like.model.heads as heads
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import build_engine, run_ranks, tiny_config, train_steps

LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
    "dp2": (2, {}),
}
# A vocabulary of 130 is padded to 256, or to 512 over 4 ranks: at tp 2 the second rank holds 2 rows of it.
MODELS = {
    "plain": {"model__vocab_size": 130},
    "tied": {"model__tie_embeddings": True},
    "norm head": {"model__norm_head": True, "model__vocab_size": 130},
}


def three_steps(config):
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        fused = {model.output_layer.fused for model in engine.models if model.post_process}
        return train_steps(engine, config, 3), fused


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fused_loss_trains_as_the_plain_one(layout, model, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    found = {}
    for choice in ("off", "fused"):
        config = tiny_config(tmp_path, parallel=parallel, kernels__linear_cross_entropy=choice, **MODELS[model])
        results = run_ranks(ranks, three_steps, config)
        assert {f for _, fused in results for f in fused} == {choice == "fused"}
        found[choice] = results[-1][0]
    assert found["fused"] == [pytest.approx(step, rel=1e-5) for step in found["off"]]
    assert found["off"][0] != found["off"][2]


def test_in_bf16_it_trains_alike_with_full_recompute(tmp_path):
    found = {}
    for choice in ("off", "fused"):
        changes = {"train__precision": "bf16", "train__recompute": "full", "kernels__linear_cross_entropy": choice}
        ((steps, _),) = run_ranks(1, three_steps, tiny_config(tmp_path, **changes))
        found[choice] = steps
    for (loss, norm), (expected, expected_norm) in zip(found["fused"], found["off"], strict=True):
        assert loss == pytest.approx(expected, rel=2e-3)
        assert norm == pytest.approx(expected_norm, rel=2e-2)


def gradients_in_the_logits_memory(config):
    """Whether the logits' gradient lies where the logits were, for each call of the loss in a step."""
    found, original = [], heads.cross_entropy

    def cross_entropy(logits, *args, **options):
        place = logits.data_ptr()
        logits.register_hook(lambda gradient: found.append(gradient.data_ptr() == place))
        return original(logits, *args, **options)

    heads.cross_entropy = cross_entropy
    with parallel_context(config.parallel) as ctx:
        train_steps(build_engine(config, ctx), config, 1)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_the_plain_loss_writes_the_gradient_over_the_logits(model, tmp_path):
    config = tiny_config(tmp_path, kernels__linear_cross_entropy="off", **MODELS[model])
    (found,) = run_ranks(1, gradients_in_the_logits_memory, config)
    assert found
    assert all(found)
