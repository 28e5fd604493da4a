"""A checkpoint of any layout loads into any other: parameters, moments, step counts, exactly."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.index import FragmentTable
from flagscale_like.checkpoint.manifest import INDEX, verify_files
from flagscale_like.checkpoint.shard import MOMENTS
from flagscale_like.checkpoint.tensor_file import TensorFile
from flagscale_like.cli import app
from flagscale_like.engine.shards import parameter_pieces
from flagscale_like.rehearsal.checkpoint_plan import States, bytes_of_files, plan_load, planned_index
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.run import start
from tests import faults
from tests.harness import run_ranks, tiny_config

KINDS = ("param", *MOMENTS)

# name -> (changes of the configuration, layouts as (ranks, layout) one after the other). The vocabulary of 250 is padded to
# 256 rows, and with tp 4 to 512.
CHAINS = {
    "fp32": (
        {"train__precision": "fp32", "model__num_query_groups": 4},
        [
            (4, {"tp": 4}),
            (2, {"pp": 2, "vpp": 2}),
            (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
            (4, {"tp": 2}),
            (1, {}),
        ],
    ),
    "bf16, tied embeddings": (
        {"train__precision": "bf16", "model__num_query_groups": 4, "model__tie_embeddings": True},
        [(2, {"tp": 2}), (3, {"pp": 3, "first_stage_layers": 2}), (4, {}), (1, {})],
    ),
    "bf16, experts": (
        {
            "train__precision": "bf16",
            "model__experts": {
                "count": 4,
                "top_k": 2,
                "ffn_hidden_size": 40,
                "score": "sigmoid",
                "bias_rate": 0.1,
                "shared_ffn_hidden_size": 16,
                "dense_layers": 1,
            },
        },
        [
            (2, {"ep": 2}),
            (4, {"tp": 2, "sp": True, "ep": 4}),
            (4, {"pp": 2, "vpp": 2, "ep": 2}),
            (4, {"ep": 2, "cp": 2}),
            (1, {}),
        ],
    ),
}


def count_reads():
    """Count from now on in this process what is copied out of checkpoints: the elements of each part, and its file."""
    found, copy = [], CheckpointReader._copy

    def counted(reader, row, kind, target, out):  # of several threads
        found.append((copied := copy(reader, row, kind, target, out), row.file))
        return copied

    CheckpointReader._copy = counted
    return found


def load_and_save(config, out):
    """Load on this layout and save as it is, without a step; where the run stands, and what was read for it."""
    reads = count_reads()
    with parallel_context(config.parallel) as ctx:
        begun = start(config, ctx)
        begun.store.root = Path(out)
        if ctx.is_main:
            Path(out).mkdir(parents=True)
        ctx.barrier()
        engine, progress = begun.engine, begun.progress
        begun.store.save(progress.step, engine.fragments, {**begun.saved, **engine.state()})
        begun.store.finish()
        (saved,) = begun.store.take_outcomes()
        assert saved.error is None
        rate = engine.optimizer.param_groups[0]["lr"]
        read = (len(reads), sum(elements for elements, _ in reads), len({file for _, file in reads}))
        assert_read_whole(engine, begun.reader)
        return progress.step, progress.consumed, begun.scheduler.num_steps, rate, read


def assert_read_whole(engine, source):
    """Every weight on this rank has the bits that it would have if the rank had read all of it for itself."""
    for model in engine.models:
        for parameter, pieces in parameter_pieces(model, engine.ctx).items():
            for piece in pieces:
                expected = torch.full((piece.box.numel,), math.nan, dtype=parameter.dtype)
                source.read("param", piece.box, expected)
                found = parameter.detach().view(-1)[piece.start :][: piece.box.numel]
                assert torch.equal(found, expected), piece.box.key


def contents(folder, vocab_size):
    """Every tensor of a checkpoint, whole, without the rows of the padded vocabulary."""
    reader = CheckpointReader(folder)
    rows = {"embedding.word_embeddings.weight": vocab_size, "output_layer.weight": vocab_size}
    return {
        (key, kind): reader.full(key, kind)[: rows.get(key)]
        for key in reader.shapes()
        for kind in KINDS
        if reader.has(kind, [key])
    }


def assert_planned(folder, planned):
    """The index that the ranks wrote is the one that the rehearsal plans for their layout."""
    real = FragmentTable.load(folder / INDEX)
    assert planned.names.keys == real.names.keys
    for name in ("offset", "shape", "start", "stop", "place"):
        assert np.array_equal(getattr(planned, name), getattr(real, name)), name
    for name, kind in (("file", "files"), ("form", "forms")):
        ours, theirs = ([getattr(one.names, kind)[i] for i in getattr(one, name)] for one in (planned, real))
        assert ours == theirs
    for file, size in zip(planned.names.files, bytes_of_files(planned), strict=True):
        tensors = TensorFile(folder / file)
        specs = [spec for name, spec in tensors.specs.items() if not name.startswith("rng.")]
        assert size == sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
        tensors.close()


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_of_layouts_ends_with_the_tensors_it_began_with(chain, tmp_path):
    model, layouts = CHAINS[chain]
    run_ranks(2, faults.train_run, tiny_config(tmp_path / "0", train__steps=3, **model))
    original = contents(tmp_path / "0" / "checkpoints" / "step_00000003", 250)
    assert all(bool(t.any()) for t in original.values())
    assert {key for key, kind in original if (key, "exp_avg") not in original} == {
        f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in range(1, 4) if "experts" in chain
    }
    assert {t.dtype for (key, _), t in original.items() if key.endswith(("expert_bias", "exp_avg"))} <= {torch.float32}
    table = planned_index(States.of(tiny_config(tmp_path / "0", **model), 2))
    for number, (ranks, layout) in enumerate(layouts):
        config = tiny_config(tmp_path / str(number), train__steps=6, parallel=layout, **model)
        out = tmp_path / str(number + 1) / "checkpoints"
        stood = run_ranks(ranks, load_and_save, config, out)
        assert {place[:3] for place in stood} == {(3, 24, 3)}  # step, samples, learning-rate steps
        assert len({place[:4] for place in stood}) == 1
        plan = plan_load(table, states := States.of(config, ranks))
        planned = zip(plan.fragments.tolist(), (plan.bytes // 4).tolist(), plan.files.tolist(), strict=True)
        assert [place[4] for place in stood] == list(planned)
        table = planned_index(states)
        assert_planned(out / "step_00000003", table)
        found = contents(out / "step_00000003", 250)
        assert found.keys() == original.keys()
        assert [key for key in found if not torch.equal(found[key], original[key])] == [], layout
    if chain == "fp32":
        padded = CheckpointReader(tmp_path / "1" / "checkpoints" / "step_00000003")
        assert padded.global_shape("output_layer.weight")[0] == 512


def test_training_goes_on_from_another_vocabulary_padding_vpp_and_dp_with_the_same_losses(tmp_path):
    """tp4 (512 rows) to one rank (256), to dp2 pp2 vpp2: losses as if one rank had done it all."""
    model, _ = CHAINS["fp32"]
    run_ranks(1, faults.train_run, tiny_config(tmp_path / "one", **model))
    for ranks, layout, steps in ((4, {"tp": 4}, 2), (1, {}, 4), (4, {"pp": 2, "vpp": 2}, 6)):
        config = tiny_config(tmp_path / "many", parallel=layout, train__exit_at_step=steps, **model)
        run_ranks(ranks, faults.train_run, config)
    expected, found = faults.losses(tmp_path / "one"), faults.losses(tmp_path / "many")
    assert len(found) == 6
    assert found == [pytest.approx(step, rel=1e-5) for step in expected]


def test_bf16_resumes_bit_for_bit(tmp_path):
    runs = []
    for name in ("whole", "parted"):
        config = tiny_config(tmp_path / name, **CHAINS["bf16, tied embeddings"][0])
        if name == "parted":
            run_ranks(2, faults.train_run, config.model_copy(update={"train": _until(config, 3)}))
        run_ranks(2, faults.train_run, config)
        runs.append((faults.losses(config.run_dir), faults.rank_files(tmp_path / name / "checkpoints/step_00000006")))
    assert runs[0] == runs[1]


def _until(config, step):
    return config.train.model_copy(update={"exit_at_step": step})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of two steps on two ranks."""
    config = tiny_config(tmp_path_factory.mktemp("source") / "run", train__steps=2, checkpoint__interval=2)
    run_ranks(2, faults.train_run, config)
    return Path(config.run_dir)


def weights_after_start(config):
    with parallel_context(config.parallel) as ctx:
        begun = start(config, ctx)
        weights = {name: p.detach().numpy() for name, p in begun.engine.model.named_parameters()}
        return begun.notes, weights, begun.progress.step


def test_weights_alone_start_a_new_run(source, tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint={"interval": 0, "load": str(source)})
    ((notes, weights, step),) = run_ranks(1, weights_after_start, config)
    assert step == 0
    assert notes == [f"starting from the weights of {source}/checkpoints/step_00000002"]
    reader = CheckpointReader(source / "checkpoints" / "step_00000002")
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    assert np.array_equal(weights[name], reader.full(name).numpy())


def listen(config):
    return faults.train_and_listen(config)


def test_a_strict_load_names_what_does_not_fit_and_a_free_one_takes_what_does(source, tmp_path):
    shorter = {"model__num_layers": 3, "checkpoint__interval": 0, "checkpoint__load": str(source)}
    ((_, error),) = run_ranks(1, listen, tiny_config(tmp_path / "strict", **shorter))
    assert "is of another model: model.num_layers: 4 saved, 3 configured" in error
    config = tiny_config(tmp_path / "free", checkpoint__load_strict=False, **shorter)
    ((notes, weights, _),) = run_ranks(1, weights_after_start, config)
    left = [note for note in notes if note.startswith("not loaded: ")]
    assert left
    assert all("the model has no decoder.layers.3." in note for note in left)
    reader = CheckpointReader(source / "checkpoints" / "step_00000002")
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    assert np.array_equal(weights[name], reader.full(name).numpy())


def test_a_free_load_leaves_what_is_of_another_vocabulary(source, tmp_path):
    changes = {"model__vocab_size": 300, "checkpoint__interval": 0, "checkpoint__load_strict": False}
    config = tiny_config(tmp_path / "run", checkpoint__load=str(source), **changes)
    ((notes, weights, _),) = run_ranks(1, weights_after_start, config)
    left = [note for note in notes if note.startswith("not loaded: ")]
    assert len(left) == 2
    assert all("is of a vocabulary of 250, the model's is of 300" in note for note in left)
    assert (weights["embedding.word_embeddings.weight"][:300] != 0).any(axis=1).all()


def test_reshard_writes_equal_files_that_load_alike(source, tmp_path):
    out = tmp_path / "run" / "checkpoints" / "step_00000002"
    result = CliRunner().invoke(
        app, ["ckpt", "reshard", str(source), "--out", str(out), "--files", "3"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert f"wrote {out}" in result.output
    assert verify_files(out, processes=1) == []
    sizes = [os.path.getsize(path) for path in sorted(out.glob("rank_*"))]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) < 4096
    a, b = contents(source / "checkpoints" / "step_00000002", 250), contents(out, 250)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    run_ranks(2, faults.train_run, tiny_config(tmp_path / "run", train__steps=3, checkpoint__interval=2))
    run_ranks(2, faults.train_run, tiny_config(source, train__steps=3, checkpoint__interval=2))
    assert faults.losses(tmp_path / "run")[-1] == faults.losses(source)[-1]


def test_reshard_can_leave_the_optimizer_behind(source, tmp_path):
    out = tmp_path / "weights"
    arguments = ["ckpt", "reshard", str(source), "--out", str(out), "--weights-only"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    reader = CheckpointReader(out)
    assert reader.has("param")
    assert not reader.has("exp_avg")
    assert math.prod(reader.global_shape("output_layer.weight")) == 256 * 64


def test_the_verbs_list_show_and_prune(source, tmp_path):
    config = tiny_config(tmp_path / "run", checkpoint={"interval": 1, "keep": 9}, train__steps=4)
    run_ranks(1, faults.train_run, config)
    root = tmp_path / "run" / "checkpoints"
    (root / "step_00000004" / "state.json").unlink()
    (root / ".tmp-step_00000005-abc").mkdir()

    def ckpt(*arguments):
        return CliRunner().invoke(app, ["ckpt", *map(str, arguments)], catch_exceptions=False).output

    listed = ckpt("list", tmp_path / "run").splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [
        ["00000004", "damaged"],
        ["3", "model"],
        ["2", "model"],
        ["1", "model"],
        ["unfinished", f"{root}/.tmp-step_00000005-abc"],
    ]
    shown = ckpt("show", root / "step_00000003", "--tensors")
    assert "consumed_samples: 24" in shown
    assert "decoder.final_layernorm.weight [64] torch.float32" in shown
    output = ckpt("prune", tmp_path / "run", "--keep", 1, "--keep-every", 2, "--dry-run")
    assert "damaged: step_00000004: state.json: No such file" in output
    assert (root / "step_00000001").is_dir()
    ckpt("prune", tmp_path / "run", "--keep", 1, "--keep-every", 2)
    # 4 is the newest (though damaged), 3 the last good one, 2 a milestone
    assert sorted(p.name for p in root.glob("[s.]*")) == ["step_00000002", "step_00000003", "step_00000004"]
