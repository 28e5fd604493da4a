"""What an engine holds and computes: frozen parameters, several models in one checkpoint, weights that are loaded once."""

import json
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from flagscale_like.arch import EMBEDDING_NAME
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.manifest import step_name
from flagscale_like.checkpoint.store import CheckpointStore
from flagscale_like.config import Checkpoint
from flagscale_like.engine import engine as engine_module
from flagscale_like.engine.engine import Engine, engine_states
from flagscale_like.errors import CheckpointError, ConfigError
from flagscale_like.model.build import named_shards
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.training.metrics import read_metrics
from tests import faults
from tests.harness import build_engine, run_ranks, tiny_config, train_steps
from tests.training.test_layouts import fork_at_step_3, losses

FROZEN = ["embedding.*", "decoder.layers.0.*", "*.mlp.*"]


@pytest.fixture(scope="module")
def partly_frozen(tmp_path_factory):
    """Six steps on one process with frozen parameters, and a checkpoint at step 3."""
    config = tiny_config(tmp_path_factory.mktemp("frozen") / "run", train__frozen=FROZEN)
    run_ranks(1, faults.train_run, config)
    return config


def weights(run_dir, step):
    reader = CheckpointReader(Path(run_dir) / "checkpoints" / step_name(step))
    return reader, {key: reader.full(key).numpy() for key in reader.keys()}


def is_frozen(key):
    return key.startswith(("embedding.", "decoder.layers.0.")) or ".mlp." in key


def test_frozen_parameters_are_saved_without_moments_and_do_not_change(partly_frozen):
    (reader, before), (_, after) = (weights(partly_frozen.run_dir, step) for step in (3, 6))
    assert {key for key in before if is_frozen(key)}
    for key in before:
        assert np.array_equal(before[key], after[key]) == is_frozen(key), key
        assert reader.has("exp_avg", [key]) != is_frozen(key)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, {"tp": 2, "sp": True, "pp": 2}), (2, {}), (2, {"cp": 2}), (2, {"pp": 2, "vpp": 2})],
    ids=["tp2 sp pp2", "dp2", "cp2", "pp2 vpp2"],
)
def test_a_run_with_frozen_parameters_goes_on_on_another_layout(partly_frozen, ranks, layout, tmp_path):
    run_dir = fork_at_step_3(Path(partly_frozen.run_dir), tmp_path / "run")
    # Full recompute: a frozen embedding's output asks for no gradient by itself.
    config = tiny_config(run_dir, train__frozen=FROZEN, train__recompute="full", parallel=layout)
    run_ranks(ranks, faults.train_run, config)
    expected, found = losses(Path(partly_frozen.run_dir)), losses(run_dir)
    assert found[3:] == [pytest.approx(pair, rel=1e-5) for pair in expected[3:]]
    assert all(norm > 0 for _, norm in found)


def test_a_parameter_that_is_no_longer_frozen_is_refused_by_name(partly_frozen, tmp_path):
    run_dir = fork_at_step_3(Path(partly_frozen.run_dir), tmp_path / "run")
    ((_, error),) = run_ranks(1, faults.train_and_listen, tiny_config(run_dir, train__frozen=FROZEN[:2]))
    assert error.startswith("CheckpointError: ")
    assert "holds no optimizer state of decoder.layers.1.mlp.linear_fc1.weight, which was frozen" in error


def test_a_tied_output_layer_is_frozen_with_the_embedding_on_every_layout(tmp_path):
    changes = {"model__tie_embeddings": True, "train__frozen": ["embedding.*"]}
    one = tiny_config(tmp_path / "one", **changes)
    run_ranks(1, faults.train_run, one)
    two = tiny_config(fork_at_step_3(Path(one.run_dir), tmp_path / "two"), parallel={"pp": 2}, **changes)
    run_ranks(2, faults.train_run, two, timeout_s=60)
    np.testing.assert_allclose(losses(Path(two.run_dir)), losses(Path(one.run_dir)), rtol=1e-5)
    (reader, before), (_, after) = (weights(two.run_dir, step) for step in (3, 6))
    assert np.array_equal(before[EMBEDDING_NAME], after[EMBEDDING_NAME])
    assert not reader.has("exp_avg", [EMBEDDING_NAME])


def test_monitors_measure_no_gradient_of_a_frozen_parameter(tmp_path):
    monitors = {"layers": {"interval": 1}, "effective_rank": {"interval": 1, "least": 1.0, "action": "stop"}}
    config = tiny_config(tmp_path / "run", train__frozen=FROZEN, train__steps=2, monitors=monitors)
    for _, error in run_ranks(2, faults.train_and_listen, config):
        assert error is None
    names = {name for record in read_metrics(tmp_path / "run") for name in record}
    assert {name for name in names if name.startswith("effective-rank/gradients/layers.1.")}
    assert not {name for name in names if "gradients" in name and ("layers.0." in name or "mlp" in name)}
    assert "layer-grad-norm/layers.1" in names
    assert "layer-grad-norm/embedding" not in names


@pytest.mark.parametrize(
    ("frozen", "layout", "message"),
    [
        (["decoder.layers.9.*"], {}, "'decoder.layers.9.*' matches no parameter"),
        (["output_layer.*"], {"pp": 2}, "'output_layer.*' matches no parameter"),  # it is the embedding's
        (["decoder.*", "embedding.*"], {"pp": 2}, "leaves a pipeline stage without a parameter to train"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(frozen, layout, message, tmp_path):
    config = tiny_config(tmp_path / "run", train__frozen=frozen, parallel=layout, model__tie_embeddings=True)
    for _, error in run_ranks(layout.get("pp", 1), faults.train_and_listen, config):
        assert error.startswith("ConfigError: train.frozen")
        assert message in error


def resumes_without_drawing(config):
    def fail(call):
        raise AssertionError("weights were drawn")

    faults.at_call(engine_module, "initialize_weights", 1, fail)
    return faults.train_and_listen(config)


def test_a_resume_and_a_strict_load_draw_no_weights(partly_frozen, tmp_path):
    run_dir = fork_at_step_3(Path(partly_frozen.run_dir), tmp_path / "run")
    ((_, error),) = run_ranks(1, resumes_without_drawing, tiny_config(run_dir, train__frozen=FROZEN))
    assert error is None
    load = {"interval": 0, "load": partly_frozen.run_dir}
    ((_, error),) = run_ranks(1, resumes_without_drawing, tiny_config(tmp_path / "new", checkpoint=load))
    assert error is None


def save_and_load_two(config, out):
    """Train a policy, save it and an untrained critic in one checkpoint; load both into engines with other weights."""
    with parallel_context(config.parallel) as ctx:
        policy = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer, name="policy")
        critic = Engine.build(ModelSpec(arch=config.model, head="value", parallel=ctx.layout), ctx, name="critic")
        train_steps(policy, config, 2)
        store = CheckpointStore(Path(out), ctx, Checkpoint())
        engines = (policy, critic)
        state = {"step": 2, "model": config.model.model_dump(mode="json"), **engine_states(engines)}
        store.save(2, lambda: (shard for engine in engines for shard in engine.fragments()), state)
        store.finish()
        reader = CheckpointReader(Path(out) / step_name(2))
        other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
        again = Engine.build(ModelSpec.of(other), ctx, optimizer=config.optimizer, name="policy")
        again.load(reader)
        value = Engine.build(
            ModelSpec(arch=config.model, head="value", parallel=ctx.layout, seed=7), ctx, source=reader, name="critic"
        )

        def contents(engine):
            named = [item for model in engine.models for item in named_shards(model).items()]
            return {name: p.detach().float().numpy() for name, p in named}

        pairs = [(contents(policy), contents(again)), (contents(critic), contents(value))]
        same = all(np.array_equal(a[name], b[name]) for a, b in pairs for name in a)
        return (
            same,
            again.state(),
            train_steps(again, config, 1),
            [*reader.keys("policy/"), *reader.keys("critic/"), *reader.keys()],
        )


def test_one_checkpoint_holds_two_models_by_their_engines_names(tmp_path):
    config = tiny_config(tmp_path / "run", parallel={"tp": 2, "sp": True}, train__precision="bf16")
    for same, state, (step,), keys in run_ranks(2, save_and_load_two, config, tmp_path / "checkpoints"):
        assert same
        assert state["adam_step"] == 2
        assert np.isfinite(step).all()
        assert {key.partition("/")[0] for key in keys} == {"policy", "critic"}
    engines = json.loads((tmp_path / "checkpoints/step_00000002/state.json").read_text())["engines"]
    assert engines == {"policy": state, "critic": {}}


def reduce_other_names(_):
    with parallel_context(tiny_config(".").parallel) as ctx:
        add_up = NamedSum(ctx)
        summed = add_up({"a": 1.0, "b": torch.tensor(2.0), "c": [1.0, float(ctx.rank)]})
        complaints = []
        for reduction, values in ((add_up, {"a": 1.0}), (NamedSum(ctx), {f"rank {ctx.rank}": 1.0})):
            try:
                reduction(values)
            except AssertionError as error:
                complaints.append(str(error))
        return summed, complaints


def test_the_reduction_adds_up_by_name_and_refuses_other_names():
    for summed, (changed, differ) in run_ranks(2, reduce_other_names, None):
        assert summed == {"a": 2.0, "b": 4.0, "c": [2.0, 1.0]}
        assert "names changed" in changed
        assert "reduce different names" in differ


def test_a_spec_needs_no_run_and_refuses_what_its_layout_does_not_divide(tmp_path):
    config = tiny_config(tmp_path, model__max_position_embeddings=64)
    assert ModelSpec(arch=config.model).seq_length == 64
    with pytest.raises(ConfigError, match=r"model.num_attention_heads \(4\) must be divisible by parallel.tp \(8\)"):
        ModelSpec(arch=config.model, parallel=config.parallel.model_copy(update={"tp": 8}))
    with pytest.raises(ConfigError, match="exceeds model.max_position_embeddings"):
        ModelSpec(arch=config.model, seq_length=65)
    assert issubclass(CheckpointError, ValueError)


# The data loader's seed; gloo's gathering of names, once; the check of a CPU's labels against the vocabulary.
CPU_ONLY = ("data/dataloader.py", "distributed_c10d.py", "flagscale_kernels/cross_entropy.py")


def waits_of_a_step(config):
    """Where one step reads a single value from a tensor, by file, other than what happens on a CPU alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                frames = [f.filename for f in traceback.extract_stack()]
                if not any(name.endswith(CPU_ONLY) for name in frames):
                    waits.append(next(name for name in reversed(frames) if "torch" not in name and name != __file__))
            return func(*args, **(kwargs or {}))

    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        train_steps(engine, config, 1)  # Adam's states are made in the first step
        with Recorder():
            train_steps(engine, config, 1)
    return waits


@pytest.mark.parametrize(("precision", "layout"), [("fp32", {}), ("bf16", {"cp": 2})])
def test_a_step_reads_no_single_value_from_the_device(precision, layout, tmp_path):
    # Its one wait is the list of the reduction.
    config = tiny_config(tmp_path, train__precision=precision, parallel=layout)
    assert run_ranks(2, waits_of_a_step, config) == [[], []]
