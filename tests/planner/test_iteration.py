"""What is planned of an iteration of reinforcement learning, against the models, caches and buffers of real runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from flagscale_like.cluster import parse_cluster
from flagscale_like.engine.asleep import TrainingMemory
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.refit import RefitEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.planner.efficiency import HOPPER
from flagscale_like.planner.iteration import Beside, beside_policy, phase_memory, plan_iteration
from flagscale_like.planner.layout import Layout
from flagscale_like.planner.memory import rank_memory
from flagscale_like.planner.search import Goal
from flagscale_like.rl.models import build_models
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.run import start
from tests.commands import command
from tests.harness import run_ranks, write_yaml
from tests.rl.runs import make_folder, rl_config

PPO = {"algorithm": "ppo", "rollout": {"samples": 1, "rows": 6}, "kl": {"coefficient": 0.05}}
LAYOUTS = {
    "tp2 sp": (2, {"parallel": {"tp": 2, "sp": True}, "train__precision": "bf16"}),
    "pp2, a tied embedding": (2, {"parallel": {"pp": 2}, "model__tie_embeddings": True}),
    "dp2": (2, {"train__precision": "bf16"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("planned"))


def held(config):
    """Of this rank: stage, rank in the stage, and the bytes of all models, awake and while they draw."""
    with parallel_context(config.parallel) as ctx:
        begun = start(config, ctx)
        models = build_models(config, begun)
        trained = [models.policy, models.critic.engine]
        buffers = [buffer for engine in trained for chunk in engine.chunks for buffer in chunk.buffers]

        def gradients():
            return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)

        own, awake = sum(buffer.param_data.nbytes for buffer in buffers), gradients()
        reference = sum(p.nbytes for model in models.reference.engine.models for p in model.parameters())
        states = sum(engine.state_bytes() for engine in trained)
        for engine in trained:
            TrainingMemory(engine).sleep()
        generator = OwnEngine(models.policy, rows=6, room=config.train.seq_length)
        list(generator.generate([Prompt([1], n) for n in range(6)], Sampling(config.train.seq_length - 1)))
        place = ctx.pp_rank, ctx.rank % (ctx.world_size // config.parallel.pp)
        whole = RefitEngine(models.policy, rows=6, room=config.train.seq_length)
        whole.cache.reserve(config.train.seq_length, config.train.seq_length)
        copied = sum(p.nbytes for p in whole.engine.model.parameters()), whole.cache.nbytes
        return *place, own + reference, awake, states - own - awake, gradients(), generator.cache.nbytes, copied


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_bytes_are_those_that_a_run_holds(name, folder, tmp_path):
    ranks, changes = LAYOUTS[name]
    config = rl_config(tmp_path, folder, PPO, **changes)
    goal, layout = Goal.of(config, cuda=False), Layout.of(config, ranks)
    beside = beside_policy(config, [], cuda=False)
    assert [one.name for one in beside] == ["critic", "reference"]
    refit = rl_config(tmp_path, folder, PPO | {"rollout": PPO["rollout"] | {"engine": "refit"}}, **changes)
    for stage, rank, weights, gradients, optimizer, asleep, cache, copied in run_ranks(ranks, held, config):
        options = {"seq_length": goal.seq_length, "precision": goal.precision, "ops": goal.ops, "overhead": False}
        memory = rank_memory(config.model, layout, stage, rank=rank, **options)
        phases = phase_memory(config, layout, memory, stage, beside, cuda=False, rank=rank)
        for phase in ("score", "learn"):
            found = phases[phase]
            assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
        drawing = phases["draw"]
        assert (drawing.weights, drawing.gradients, drawing.optimizer) == (weights, asleep, optimizer)
        assert drawing.cache == cache
        drawing = phase_memory(refit, layout, memory, stage, beside, cuda=False, rank=rank)["draw"]
        assert (drawing.weights - weights, drawing.cache) == copied


def planned(config, cluster=None, rewards=(), **changes):
    goal, layout = Goal.of(config, cuda=True), Layout.of(config, 1 + config.ranks_apart)
    options: dict[str, Any] = {"seq_length": goal.seq_length, "precision": goal.precision, "ops": goal.ops}
    memory = [rank_memory(config.model, layout, 0, **options)]
    place = parse_cluster(cluster) if cluster else None
    return plan_iteration(config, layout, memory, list(rewards), prompt=8, cluster=place, cuda=True)


def test_on_a_gpu_the_reference_and_the_sleeping_states_are_in_host_memory(folder, tmp_path):
    config = rl_config(tmp_path, folder, PPO)
    found = {phase: stages[0] for phase, stages in planned(config).memory.items()}
    draw, learn = found["draw"], found["learn"]
    assert draw.optimizer == draw.gradients == 0
    assert draw.host == learn.host + learn.optimizer
    reference = learn.host
    kept = {p: s[0] for p, s in planned(rl_config(tmp_path, folder, PPO | {"kl": {"memory": "device"}})).memory.items()}
    assert kept["learn"].weights == learn.weights + reference
    model = Beside(name="model", arch=config.model, heads=3, precision="fp32")
    with_reward = planned(config, rewards=[model]).memory["learn"][0]
    assert with_reward.weights == learn.weights + model.states(Layout.of(config, 1), 0)[0]
    apart = PPO | {"staleness": 1, "rollout": {"samples": 1, "rows": 6, "apart": 1}}
    alone = planned(rl_config(tmp_path, folder, apart)).memory["draw"][0]
    assert (alone.optimizer, alone.host, alone.cache) == (0, 0, draw.cache)
    assert alone.weights < draw.weights


def test_drawing_takes_as_long_as_reading_the_weights(folder, tmp_path):
    """A large model and few texts: every token is a pass over the weights; more texts share the pass."""
    large = {
        "num_layers": 24, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8, "ffn_hidden_size": 12288
    }  # fmt: skip
    changes = {f"model__{name}": value for name, value in large.items()}
    few = rl_config(tmp_path, folder, PPO, train__precision="bf16", train__global_batch_size=4, **changes)
    many = rl_config(tmp_path, folder, PPO, train__precision="bf16", train__global_batch_size=12, **changes)
    weights = few.model.parameter_count() * 2 - few.model.vocab_size * 4096 * 2
    seconds = planned(few, "1x1xH100").seconds["draw"]
    reading, launches = weights / (3350e9 * HOPPER.memory), 24 * HOPPER.layer_overhead_s
    assert seconds == pytest.approx(10 * (reading + launches), rel=0.15)  # and the prompts' pass
    assert planned(many, "1x1xH100").seconds["draw"] == pytest.approx(2 * seconds, rel=0.05)  # six rows, twice
    assert planned(many, "1x1xH100").seconds["learn"] > 1.2 * planned(few, "1x1xH100").seconds["learn"]


def test_the_plan_of_an_iteration_is_printed(folder, tmp_path):
    path = write_yaml(rl_config(tmp_path / "run", folder, PPO), tmp_path / "run.yaml")
    said = command("train", str(path), "--dry-run", "--cluster", "1x1xH100", "--world-size", "1")
    assert said.returncode == 0, said.stderr
    columns = ["weights", "gradients", "optimizer", "keys and values", "activations", "overhead", "total", r"\(host\)"]
    assert re.search(r"^phase \(GiB\) +" + " +".join(columns) + "$", said.stdout, re.MULTILINE)
    seconds = (
        r"s an iteration where all of its 32 rollouts have \d+ \+ 10 tokens \(.*\): draw .* s, score .* s, learn .* s"
    )
    assert re.search(seconds, said.stdout)
    large = ["rl.reward={kind: model, path: none}", "rl.rollout.rows=100000", "train.seq_length=65536"]
    said = command("plan", str(path), *large, "--cluster", "1x1xA100-40", "--max-vpp", "1", "--top", "1")
    assert said.returncode == 10, said.stdout
    assert "none has room for all models of the run: the nearest needs" in said.stderr
    assert not Path(tmp_path / "run").exists()
