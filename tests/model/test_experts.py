"""Mixture of experts: every layout learns what one does; the router's losses, counts and bias; the grouped product."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from flagscale_like.arch import Experts
from flagscale_like.config import DirectPreference
from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import Engine
from flagscale_like.model.experts import GroupedExperts, balance_loss
from flagscale_like.model.offload import attach_offload
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.objectives.preference import Preference
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.reduction import NamedSum
from tests.harness import build_engine, run_ranks, tiny_config, train_steps

ROWS, LENGTH, STEPS = 8, 32, 2
FOUR: dict[str, Any] = {"count": 4, "top_k": 2, "ffn_hidden_size": 48, "coefficient": 0.1}
KINDS = {
    "batch": {**FOUR, "z_loss": 1e-3},
    "sequence": {**FOUR, "balance": "sequence", "shared_ffn_hidden_size": 32, "shared_gate": True, "dense_layers": 1},
    "bias": {
        **FOUR,
        "score": "sigmoid",
        "bias_rate": 0.01,
        "balance": "none",
        "shared_ffn_hidden_size": 32,
        "scale": 1.5,
    },
    "groups": {**FOUR, "score": "sigmoid", "groups": 2, "bias_rate": 0.01, "balance": "sequence"},
    "best of a group": {**FOUR, "groups": 2, "top_groups": 1, "group_score": "max", "normalize": False},
}
SP = {"tp": 2, "sp": True}
FULL, OFFLOAD = {"train__recompute": "full"}, {"offload": {"share": 1.0, "min_tensor_bytes": 0}}
# name -> (layout on four ranks, [(kind, packed, rows of a micro-batch, changes)])
LAYOUTS = {
    "ep4": ({"ep": 4}, [("batch", False, 1, {}), ("sequence", True, 2, {}), ("best of a group", False, 1, {})]),
    "dp2 x ep2": ({"ep": 2}, [("bias", False, 1, {}), ("sequence", False, 2, {}), ("groups", True, 1, OFFLOAD)]),
    "dp4": ({}, [("sequence", True, 2, FULL), ("bias", False, 2, {})]),
    "tp2 sp, ep2": ({**SP, "ep": 2}, [(kind, kind == "sequence", 1, {}) for kind in KINDS]),
    "tp2 sp, ep4": ({**SP, "ep": 4}, [("sequence", True, 2, {}), ("batch", False, 1, FULL)]),
    "tp2 sp": (SP, [("sequence", True, 2, {}), ("groups", False, 1, {})]),
    "pp2 x ep2": (
        {"pp": 2, "ep": 2},
        [("sequence", False, 2, FULL), ("bias", True, 1, {}), ("batch", False, 1, OFFLOAD)],
    ),
    "pp2 vpp2 x ep2": ({"pp": 2, "vpp": 2, "ep": 2}, [("sequence", False, 1, FULL), ("batch", False, 1, {})]),
    "cp2 x ep2": ({"cp": 2, "ep": 2}, [("sequence", False, 2, {}), ("sequence", True, 2, {}), ("bias", False, 1, {})]),
    "cp2 x ep4": ({"cp": 2, "ep": 4}, [("batch", False, 1, {})]),
    "tp2 sp cp2": ({**SP, "cp": 2, "ep": 2}, [("sequence", True, 2, {}), ("groups", False, 1, FULL)]),
}
# An auxiliary loss over a micro-batch's tokens depends on the micro-batch size by its definition: its runs have one row.


def batches(step, rows, packed, ctx):
    for turn in range(ROWS // rows // ctx.dp):
        place = turn * ctx.dp + ctx.dp_rank
        tokens = torch.stack(
            [
                torch.randint(0, 250, (LENGTH + 1,), generator=torch.Generator().manual_seed(1000 * step + row))
                for row in range(place * rows, (place + 1) * rows)
            ]
        )
        counted = (
            torch.arange(LENGTH) >= torch.arange(place * rows, (place + 1) * rows)[:, None]
        )  # rows count differently
        bounds = list(itertools.accumulate([8, 24] * rows))
        yield Batch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=counted.float(),
            documents=torch.tensor([0, *bounds], dtype=torch.int32) if packed else None,
        )


def learn(config, packed, ctx):
    """[(loss, gradient norm, tokens)] of the steps; by layer, the tokens of each expert and the bias."""
    engine = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer)
    offload = attach_offload(engine.models, config, ctx)
    objective, rows, found = NextToken(packed=packed), config.train.micro_batch_size, []
    for step in range(STEPS):
        outputs = engine.forward_backward(batches(step, rows, packed, ctx), objective, ROWS // rows // ctx.dp)
        sums = NamedSum(ctx)({"square": outputs.grad_square, **outputs.sums})
        engine.update(clip=1.0, grad_norm=math.sqrt(sums["square"]))
        found.append((sums["total"] / sums["count"], math.sqrt(sums["square"]), sums["count"]))
    assert offload is None or offload.report()["bytes_out"] > 0
    loads = {
        router.layer_number: (
            router.load[:-1].tolist(),
            [] if router.expert_bias is None else router.expert_bias.tolist(),
        )
        for router in engine.routers
    }
    return found, dict(item for stage in ctx.gather(loads) for item in stage.items())


def learn_all(runs):
    torch.set_num_threads(1)
    found = []
    for layout, group in itertools.groupby(runs, key=lambda run: run[0].parallel):
        with parallel_context(layout) as ctx:
            found += [learn(config, packed, ctx) for config, packed in group]
    return found


def config_of(folder, kind, rows, parallel, changes):
    fixed = {"train__global_batch_size": ROWS, "train__seq_length": LENGTH, "optimizer__lr": 1e-3}
    settings = {"model__experts": KINDS[kind], "train__micro_batch_size": rows, **fixed, **changes}
    return tiny_config(folder, parallel=parallel, model__init_std=0.1, **settings)


def test_every_layout_learns_what_one_process_learns(tmp_path):
    names = [(layout, *run) for layout, (_, runs) in LAYOUTS.items() for run in runs]
    alone = sorted({(kind, packed) for _, kind, packed, *_ in names})
    (expected,) = run_ranks(1, learn_all, [(config_of(tmp_path, kind, 1, {}, {}), packed) for kind, packed in alone])
    expected = dict(zip(alone, expected, strict=True))
    runs = [(config_of(tmp_path, kind, rows, LAYOUTS[at][0], more), packed) for at, kind, packed, rows, more in names]
    for results in run_ranks(4, learn_all, runs, timeout_s=300):
        for name, (steps, loads) in zip(names, results, strict=True):
            one, one_loads = expected[name[1], name[2]]
            np.testing.assert_allclose(steps, one, rtol=1e-5, err_msg=str(name))
            assert loads == one_loads, name
    assert {tuple(bias) for _, bias in expected["bias", False][1].values()} - {()}  # it moved
    assert all(any(bias) for _, bias in expected["bias", False][1].values())
    assert set(expected["sequence", True][1]) == {2, 3, 4}  # the first layer is dense


def gradient_of(config, objective, step_batches):
    """Of a model of one layer: the gradient of its router's weight, that weight, and the router's inputs by micro-batch."""
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        (router,) = engine.routers
        inputs, gating = [], router.gating

        def remember(x):
            inputs.append(x.detach().transpose(0, 1).flatten(0, 1).double())  # [s, b, h] -> rows one after another
            return gating(x)

        router.gating = remember
        engine.forward_backward(iter(step_batches), objective, len(step_batches))
        (shard,) = [s for s in engine.owned if s.name == "decoder.layers.0.mlp.router.weight"]
        return shard.main.grad.view_as(router.weight).double(), router.weight.detach().double(), inputs


def auxiliary(weight, inputs, length):
    """The literal definition, of each row: experts * sum_i f_i P_i, with top-2 of 4 and softmax scores."""
    found = []
    for row in (inputs @ weight.t()).softmax(-1).view(-1, length, 4):
        share = F.one_hot(row.topk(2, dim=-1).indices, 4).sum((0, 1)) / (2 * length)
        found.append(4 * (share * row.mean(0)).sum())
    return torch.stack(found)


def pair_batches():
    generator = torch.Generator().manual_seed(1)
    for pairs in (2, 4):
        tokens = torch.randint(0, 250, (2, LENGTH), generator=generator)
        bounds = torch.linspace(0, 2 * LENGTH, 2 * pairs + 1).int()
        lengths = bounds.diff().long()
        yield Batch(
            tokens=tokens,
            labels=tokens.roll(-1, 1),
            loss_mask=torch.ones(2, LENGTH),
            documents=bounds,
            extras={"lengths": lengths, "weights": torch.ones(pairs), "margins": torch.zeros(pairs)},
        )


def auxiliary_gradients(config):
    """For each objective: the router's gradient with the auxiliary loss, less that without; and the literal definition's."""
    torch.set_num_threads(1)
    with parallel_context(config.parallel) as ctx:
        text = list(batches(0, 2, False, ctx))
    plain = config.model.experts.model_copy(update={"coefficient": 0.0})
    without = config.model_copy(update={"model": config.model.model_copy(update={"experts": plain})})
    pairs = Preference(DirectPreference(kind="dpo", reference="none"))
    found = []
    for objective, given in ((NextToken(), text), (pairs, list(pair_batches()))):
        bare, *_ = gradient_of(without, objective, given)
        full, weight, inputs = gradient_of(config, objective, given)
        counts = torch.cat([objective.row_counts(batch) for batch in given]).double()
        weight.requires_grad_()
        losses = auxiliary(weight, torch.cat(inputs), LENGTH)
        (literal,) = torch.autograd.grad((losses * counts).sum() / counts.sum(), weight)
        found.append(((full - bare).numpy(), (config.model.experts.coefficient * literal).numpy()))
    return found


def test_the_auxiliary_loss_has_its_weight_whatever_the_objective_counts(tmp_path):
    """The step learns its mean over rows, weighted with their counts: tokens, or pairs."""
    experts = {**FOUR, "balance": "sequence"}
    config = tiny_config(
        tmp_path, model__num_layers=1, model__init_std=0.3, model__experts=experts, train__micro_batch_size=2
    )
    (found,) = run_ranks(1, auxiliary_gradients, config)
    for grown, literal in found:
        np.testing.assert_allclose(grown, literal, rtol=1e-3, atol=1e-3 * np.abs(literal).max())


def test_an_even_load_has_the_auxiliary_loss_1():
    counts, scores = torch.full((3, 4), 8.0), torch.full((3, 4), 4.0)  # rows of 16 tokens, top 2 of 4
    counts[0] = torch.tensor([16.0, 16.0, 0.0, 0.0])
    scores[0] = torch.tensor([8.0, 8.0, 0.0, 0.0])
    assert balance_loss(counts, scores, 16, 2).tolist() == [2.0, 1.0, 1.0]


def count_in_bf16(config):
    torch.set_num_threads(1)
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        router = engine.routers[0]
        with torch.no_grad():
            router.expert_bias.copy_(torch.tensor([0.1, 1e-4, 3.0, -1.0]))
        engine.models[0].bfloat16()
        x = torch.randn(100, 1, 64, dtype=torch.bfloat16)
        for _ in range(1000):
            router(x)
        return router.take_load().tolist(), router.expert_bias.tolist(), router.weight.dtype


def test_bf16_counts_every_token_of_1000_micro_batches_and_keeps_the_bias(tmp_path):
    config = tiny_config(tmp_path, model__experts=KINDS["bias"], train__precision="bf16")
    ((load, bias, dtype),) = run_ranks(1, count_in_bf16, config)
    assert dtype is torch.bfloat16
    assert sum(load[:-1]) == 2 * 100 * 1000  # a bf16 count of 100 tokens at a time stops at 32,768
    assert bias == torch.tensor([0.1, 1e-4, 3.0, -1.0]).tolist()


def loop(x, fc1, fc2, counts, probs):
    outputs = []
    for tokens, up, down, weights in zip(x.split(counts), fc1, fc2, probs.split(counts), strict=True):
        gate, value = F.linear(tokens, up).float().chunk(2, dim=-1)
        outputs.append(F.linear((F.silu(gate) * value * weights[:, None]).to(x.dtype), down))
    return torch.cat(outputs)


def grouped_and_looped(config):
    """Output and gradients of both, bit for bit, by data type; the second expert has no token."""
    same = {}
    with parallel_context(config.parallel) as ctx:
        experts = build_engine(config, ctx).models[0].decoder.layers[0].mlp.experts
        assert isinstance(experts, GroupedExperts)
        for dtype in (torch.float32, torch.bfloat16):
            module, counts = experts.to(dtype), [5, 0, 17, 10]
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
            probs = torch.rand(32, generator=torch.Generator().manual_seed(4)).requires_grad_()
            fc1, fc2 = module.linear_fc1.weight, module.linear_fc2.weight
            inputs = (x, probs, fc1, fc2)
            results = []
            for output in (module(x, torch.tensor(counts), probs)[0], loop(x, fc1, fc2, counts, probs)):
                weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
                results.append((output, *torch.autograd.grad(output, inputs, weights)))
            same[str(dtype)] = [bool(torch.equal(a, b)) for a, b in zip(*results, strict=True)]
            apart = (results[0][2].float() - results[1][2].float()).abs().max() / results[1][2].abs().max()
            same[f"{dtype} probs"] = float(apart)
    return same


def test_the_grouped_product_is_bit_equal_to_a_loop_over_the_experts(tmp_path):
    config = tiny_config(tmp_path, model__experts=FOUR)
    (same,) = run_ranks(1, grouped_and_looped, config)
    for dtype, tolerance in (("torch.float32", 1e-6), ("torch.bfloat16", 1e-2)):
        output, x, _, fc1, fc2 = same[dtype]
        assert (output, x, fc1, fc2) == (True, True, True, True), dtype
        assert same[f"{dtype} probs"] < tolerance  # autograd of the loop adds the channels up in another order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "experts.top_k (5) must be at most experts.count (4)"),
        ({"bias_rate": 0.1}, "experts.bias needs experts.score sigmoid"),
        ({"groups": 3}, "experts.count (4) must be divisible by experts.groups (3)"),
        ({"groups": 4, "group_score": "max"}, "experts.top_k (2) exceeds the 1 experts"),
        ({"groups": 2, "top_groups": 3}, "experts.top_groups (3) must be at most experts.groups (2)"),
        ({"top_k": 1}, "the router would learn nothing"),
        ({"shared_gate": True}, "there is no shared FFN to gate"),
        ({"dense_layers": [2, 1]}, "each once and in order"),
        ({"score": "sigmoid", "normalize": False}, "experts.normalize false needs experts.score softmax"),
    ],
)
def test_experts_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        Experts(**{**FOUR, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"ep": 3}}, "experts.count (4) must be divisible by parallel.ep (3): ep 2 or 4 would do"),
        ({"parallel": {"tp": 2}}, "model.experts with parallel.tp (2) needs parallel.sp true"),
        ({"model__experts": None, "parallel": {"ep": 2}}, "parallel.ep (2) needs model.experts"),
        ({"model__experts": {**FOUR, "dense_layers": [4]}}, "dense_layers names layer 4"),
        (
            {"model__experts": {**FOUR, "shared_ffn_hidden_size": 33}, "parallel": SP},
            "shared_ffn_hidden_size (33) must be divisible by parallel.tp (2)",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_experts_is_refused(changes, message, tmp_path):
    with pytest.raises(ValidationError) as error:
        tiny_config(tmp_path, **{"model__experts": FOUR, **changes})
    assert message in str(error.value)


def train_collapsed(config):
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        for router in engine.routers:
            with torch.no_grad():
                router.expert_bias.copy_(torch.tensor([10.0, 10.0, 0.0, 0.0]))
        steps = train_steps(engine, config, 2)
        return steps, [router.load[:-1].tolist() for router in engine.routers]


def test_a_router_that_sends_every_token_to_the_same_experts_trains(tmp_path):
    config = tiny_config(tmp_path, model__experts=KINDS["bias"], parallel={"ep": 2})
    for steps, loads in run_ranks(2, train_collapsed, config):
        assert np.isfinite(steps).all()
        assert loads == [[8 * 32, 8 * 32, 0, 0]] * 4
