"""Initialisation: the published Aquila2 scheme, muP's widths, and salience that a calibration makes even on every layout."""

import re
from typing import Any

import pytest
import torch

from flagscale_like.arch import Role
from flagscale_like.config import Init, MuP, RunConfig
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError
from flagscale_like.model.build import named_shards
from flagscale_like.model.initialise import matrix_std
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training import salience
from flagscale_like.training.learning_rate import build_scheduler
from flagscale_like.training.run import set_steps, start
from tests import faults
from tests.harness import build_engine, run_ranks, tiny_config, train_steps


def statistics_of_weights(configs):
    """Per configuration: each parameter's (standard deviation, mean)."""
    found = []
    for config in configs:
        with parallel_context(config.parallel) as ctx:
            chunk = Engine.build(ModelSpec.of(config), ctx).model
            rows = config.model.vocab_size
            values = {n: p.detach()[:rows] for n, p in named_shards(chunk).items()}
            found.append({n: (float(v.std()), float(v.mean())) for n, v in values.items()})
    return found


def of(found, ending):
    return [pair for name, pair in found.items() if name.endswith(ending)]


def test_published_schemes_and_widths_are_drawn_as_said(tmp_path):
    aquila = tiny_config(tmp_path, model__init_std=0.0165, model__norm_init=0.3)
    standard = tiny_config(tmp_path, init={"scheme": "standard"})
    narrow, wide = (
        tiny_config(tmp_path, model__hidden_size=h, model__head_dim=16, init={"mup": {"base_hidden_size": 64}})
        for h in (64, 256)
    )
    ((a, s, n, w),) = run_ranks(1, statistics_of_weights, [aquila, standard, narrow, wide])
    near: dict[str, Any] = {"rel": 0.05}
    assert all(pair[1] == pytest.approx(0.3) for pair in of(a, "layernorm.weight"))
    assert all(pair[0] == pytest.approx(0.0165, **near) for pair in of(a, "linear_qkv.weight"))
    assert all(pair[0] == pytest.approx(0.0165 / 8**0.5, **near) for pair in of(a, "linear_fc2.weight"))
    assert all(pair[0] == pytest.approx(0.02, **near) for pair in of(s, "linear_fc2.weight"))
    for ending, factor in {
        "word_embeddings.weight": 1,
        "linear_qkv.weight": 2,
        "linear_proj.weight": 2,
        "linear_fc1.weight": 2,
        "linear_fc2.weight": 2,
        "output_layer.weight": 4,
    }.items():
        for before, after in zip(of(n, ending), of(w, ending), strict=True):
            assert before[0] / after[0] == pytest.approx(factor, **near), ending


def test_an_output_init_std_that_is_given_overrides_the_scheme(tmp_path):
    config = tiny_config(tmp_path, model__output_init_std=0.5, init={"scheme": "standard"})
    assert matrix_std(Role.FFN_OUT, ModelSpec.of(config)) == 0.5


def learning_rates(config):
    """Global parameter name -> learning rate of its group, of this rank's optimizer; and what is logged."""
    with parallel_context(config.parallel) as ctx:
        begun = start(config, ctx)
        begun.scheduler.step(increment=config.optimizer.warmup_steps)
        found = {s.name: (s.group["lr"], s.group["weight_decay"]) for s in begun.engine.owned}
        return found, begun.engine.optimizer.param_groups[0]["lr"]


def test_mup_divides_the_learning_rate_of_matrices_on_every_stage(tmp_path):
    config = tiny_config(tmp_path / "run", init={"mup": {"base_hidden_size": 16}}, parallel={"pp": 2})
    for found, logged in run_ranks(2, learning_rates, config):
        assert logged == pytest.approx(1e-2)
        for name, (rate, decay) in found.items():
            matrix = name.endswith("weight") and "layernorm" not in name
            assert rate == pytest.approx(1e-2 / 4 if matrix and "embedding" not in name else 1e-2), name
            assert decay == (0.1 if matrix else 0.0), name


def movement_of_logits(config):
    """Root mean square by which a run moves the logits of some tokens."""
    tokens, found = torch.arange(64).view(2, 32), []

    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        set_steps(build_scheduler(engine.optimizer, config), config.optimizer.warmup_steps)
        for steps in (0, config.train.steps):
            train_steps(engine, config, steps)
            with torch.no_grad():
                logits = engine.model(input_ids=tokens, position_ids=None, attention_mask=None)
            found.append(logits[..., : config.model.vocab_size].float().clone())
    return float((found[1] - found[0]).square().mean().sqrt())


def movements(configs):
    return [movement_of_logits(config) for config in configs]


def test_with_mup_a_step_moves_the_logits_as_far_at_any_width_and_without_it_does_not(tmp_path):
    def config(name, hidden, **init):
        shape = {"model__hidden_size": hidden, "model__num_attention_heads": hidden // 16, "model__num_query_groups": 0}
        shape |= {"model__ffn_hidden_size": 2 * hidden, "model__num_layers": 2, "optimizer__lr": 2e-3}
        fixed = {"train__steps": 4, "optimizer__schedule": "constant", "checkpoint": {"interval": 0}}
        return tiny_config(tmp_path / f"{name}{hidden}", init=init, **shape, **fixed)

    mup = {"mup": {"base_hidden_size": 32}}
    configs = [config("plain", 32), config("plain", 256), config("mup", 32, **mup), config("mup", 256, **mup)]
    ((plain_32, plain_256, mup_32, mup_256),) = run_ranks(1, movements, configs)
    assert mup_32 == pytest.approx(plain_32, rel=1e-4)  # the base width itself
    assert plain_256 / plain_32 > 2
    assert 0.4 < mup_256 / mup_32 < 1.5  # the plain one grows with the width instead


def test_mup_of_tied_embeddings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs model.tie_embeddings false"):
        tiny_config(tmp_path, model__tie_embeddings=True, init={"mup": {"base_hidden_size": 16}})
    assert issubclass(ConfigError, ValueError)
    assert Init(mup=MuP(base_hidden_size=1)).salience is None


# Salience


def calibrated(config: RunConfig):
    """(what the run said, the scales)."""
    held, run = [], salience.SalienceCalibration.run

    def keep(self, samples):
        held.append(self)
        return run(self, samples)

    salience.SalienceCalibration.run = keep
    said, error = faults.train_and_listen(config)
    assert error is None, error
    return [line for line in said if line.startswith("salience of")], held[0].scales if held else []


def salient(run_dir, **changes):
    return tiny_config(
        run_dir,
        init={"scheme": "standard", "salience": {"samples": 8, "rounds": 2, "settle": 6}},
        model__num_layers=8,
        train__steps=2,
        checkpoint={"interval": 2},
        **changes,
    )


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory):
    config = salient(tmp_path_factory.mktemp("one") / "run", train__micro_batch_size=2)
    ((said, scales),) = run_ranks(1, calibrated, config)
    return config, said, scales


def test_the_calibration_makes_salience_even(on_one_process):
    _, (said,), scales = on_one_process
    before, after = (float(x) for x in re.search(r"smallest ([\d.]+) before, ([\d.]+) after", said).groups())
    assert before > 3
    assert after < 1.3
    assert len(scales) == 16
    assert sum(scale**2 for scale in scales) == pytest.approx(16)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, {"tp": 2, "sp": True, "pp": 2}), (4, {"pp": 2, "vpp": 2})],
    ids=["tp2 sp pp2", "pp2 vpp2 dp2"],
)
def test_every_layout_is_calibrated_alike(ranks, layout, on_one_process, tmp_path):
    whole, said, scales = on_one_process
    config = salient(tmp_path / "run", train__micro_batch_size=2, parallel=layout)
    results = run_ranks(ranks, calibrated, config)
    for _, found in results:
        assert found == results[0][1]
        assert found == pytest.approx(scales, rel=1e-3)
    assert results[0][0] == said
    expected, found = faults.losses(whole.run_dir), faults.losses(config.run_dir)
    for here, there in zip(found, expected, strict=True):
        assert here[1:] == pytest.approx(there[1:], rel=1e-4)


def test_a_resumed_run_is_not_calibrated_again(on_one_process):
    config, said, _ = on_one_process
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    ((again, _),) = run_ranks(1, calibrated, longer)
    assert len(said) == 1
    assert again == []
