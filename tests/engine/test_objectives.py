"""Objectives and heads: packs of documents, a value head and hidden states give the same on every layout."""

import dataclasses

import numpy as np
import pytest
import torch

from flagscale_like.config import DirectPreference, RewardModel
from flagscale_like.data.batch import Batch, collate
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import Cut, Loss, Objective
from flagscale_like.errors import ConfigError
from flagscale_like.model.build import build_chunks, named_shards
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.objectives.preference import Preference
from flagscale_like.objectives.reward import Reward
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.reduction import NamedSum
from tests.harness import run_ranks, tiny_config

LAYOUTS = {
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp4": (4, {"pp": 4}),
    "tp2 pp2 dp1": (4, {"tp": 2, "pp": 2}),
}
LENGTHS = (5, 11, 1, 15)


def tokens(count, seed=0):
    return torch.randint(0, 250, (1, count), generator=torch.Generator().manual_seed(seed))


def documents(rows=1):
    """Batches of one document each, and the pack that holds them all: in one row, or in two of the same length."""
    whole = tokens(sum(LENGTHS) + len(LENGTHS))
    parts = whole.split([n + 1 for n in LENGTHS], dim=1)
    each = [(part[:, :-1], part[:, 1:]) for part in parts]
    bounds = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    packed = [torch.cat(side, dim=1).view(rows, -1) for side in zip(*each, strict=True)]
    ones = torch.ones(packed[0].shape)
    return each, Batch(tokens=packed[0], labels=packed[1], loss_mask=ones, documents=bounds)


def gradients(engine):
    return {
        f"{shard.name} {shard.start}": shard.main.grad.view(-1).numpy().copy() for shard in engine.owned if shard.counts
    }


def train_on_a_pack(config, rows=1):
    with parallel_context(config.parallel) as ctx:
        spec = dataclasses.replace(ModelSpec.of(config), seq_length=sum(LENGTHS) // rows, micro_batch_size=rows)
        engine = Engine.build(spec, ctx, optimizer=config.optimizer)
        _, pack = documents(rows)
        outputs = engine.forward_backward(iter([pack]), NextToken(packed=True), 1)
        sums = NamedSum(ctx)({"norm": outputs.grad_square, **outputs.sums})
        return sums, gradients(engine)


def train_on_documents(config):
    """The same documents, a row each, added up by hand."""
    with parallel_context(config.parallel) as ctx:
        total, count, grads = 0.0, 0, {}
        for row, label in documents()[0]:
            spec = dataclasses.replace(ModelSpec.of(config), seq_length=row.shape[1])
            engine = Engine.build(spec, ctx, optimizer=config.optimizer)
            batch = Batch(tokens=row, labels=label, loss_mask=torch.ones(row.shape))
            sums = engine.forward_backward(iter([batch]), NextToken(), 1).sums
            total, count = total + float(sums["total"]), count + int(sums["count"])
            for name, grad in gradients(engine).items():
                grads[name] = grads.get(name, 0.0) + grad * float(sums["count"])
        return total, count, {name: grad / count for name, grad in grads.items()}


ARCHS = {
    "rope": {},
    "alibi": {"model__position": {"kind": "alibi"}},
    "window": {"model__sliding_window": 4},
    "dynamic": {
        "model__position": {"scaling": {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 6}}
    },
    "nlpe clipped": {"model__position": {"kind": "nlpe", "threshold": 4}},
    "nlpe compressed": {"model__position": {"kind": "nlpe", "threshold": 4, "far": "compressed"}},
}


@pytest.mark.parametrize("name", ARCHS)
def test_a_pack_gives_the_loss_and_the_gradients_of_its_documents_one_by_one(name, tmp_path):
    config = tiny_config(tmp_path, **ARCHS[name])
    ((sums, packed),) = run_ranks(1, train_on_a_pack, config)
    ((total, count, expected),) = run_ranks(1, train_on_documents, config)
    assert (sums["count"], sums["total"]) == (count, pytest.approx(total, rel=1e-6))
    for key, grad in expected.items():
        assert np.abs(packed[key] - grad).max() <= 1e-5 * np.abs(grad).max() + 1e-9, key


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_learns_a_pack_alike(layout, recompute, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    ((one, _),) = run_ranks(1, train_on_a_pack, tiny_config(tmp_path))
    changes = {"parallel": parallel, "train__recompute": recompute}
    for sums, _ in run_ranks(ranks, train_on_a_pack, tiny_config(tmp_path, **changes)):
        assert sums == pytest.approx(one, rel=1e-5)


def test_a_micro_batch_of_two_packs_is_their_documents_one_by_one(tmp_path):
    """LENGTHS fill two rows of 16: 5 and 11, 1 and 15."""
    ((one, _),) = run_ranks(1, train_on_a_pack, tiny_config(tmp_path))
    for ranks, parallel in ((1, {}), LAYOUTS["tp2 pp2 dp1"]):
        for sums, _ in run_ranks(ranks, train_on_a_pack, tiny_config(tmp_path, parallel=parallel), 2):
            assert sums == pytest.approx(one, rel=1e-5)


def test_collate_counts_the_documents_on_over_the_rows():
    row = {"tokens": torch.zeros(8), "labels": torch.zeros(8), "loss_mask": torch.ones(8)}
    batch = collate([row, {**row, "documents": torch.tensor([0, 3, 8], dtype=torch.int32)}, row])
    assert batch["documents"].tolist() == [0, 8, 11, 16, 24]
    assert batch["tokens"].shape == (3, 8)
    assert "documents" not in collate([row, row])


class Regression(Objective):
    """An objective of a value head: the squared distance of each token's value to a target, and the mean value."""

    metric = "squared error"
    sums: tuple[str, ...] = ("value",)
    cut: Cut = "tokens"
    packed = False

    def inputs(self, batch):
        return {"input_ids": batch.tokens, "position_ids": None, "attention_mask": None}

    def row_counts(self, batch):
        return batch.loss_mask.sum(1)

    def loss(self, output, batch):
        squares = (output - batch.extras["target"]).square() * batch.loss_mask
        return Loss(squares.sum(), batch.loss_mask.sum(), sums={"value": output.detach().sum()})


class Similarity(Regression):
    """An objective of hidden states: the length of each row's mean."""

    metric = "length"
    sums: tuple[str, ...] = ()
    cut: Cut = "rows"

    def row_counts(self, batch):
        return torch.ones(len(batch.tokens))

    def loss(self, output, batch):
        lengths = output.float().mean(1).square().sum(-1)
        return Loss(lengths.sum(), torch.tensor(float(len(lengths))), samples={"length": lengths.detach()})


def regress(config, head):
    """(error, gradient norm, mean value) of three steps."""
    with parallel_context(config.parallel) as ctx:
        spec = dataclasses.replace(ModelSpec.of(config), head=head, micro_batch_size=2)
        engine = Engine.build(spec, ctx, optimizer=config.optimizer)
        objective, add_up = (Regression() if head == "value" else Similarity()), NamedSum(ctx)
        found = []
        for step in range(3):
            rows = [torch.cat([tokens(32, seed=10 * step + 2 * i + j) for j in range(2)]) for i in range(2)]
            batches = (
                Batch(
                    tokens=row,
                    labels=row,
                    loss_mask=torch.ones(row.shape),
                    extras={"target": row / 250 - 0.5},
                )
                for row in rows
            )
            outputs = engine.forward_backward(batches, objective, 2)
            sums = add_up({"square": outputs.grad_square, **outputs.sums})
            engine.update(clip=0.0, grad_norm=1.0)
            found.append([value / sums["count"] for value in sums.values()])
        return found, list(outputs.samples), [n for m in engine.models for n in named_shards(m)]


@pytest.mark.parametrize("head", ["value", "hidden"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "cp2"])
def test_every_layout_trains_a_head_alike_also_where_embeddings_are_tied(layout, head, tmp_path):
    ranks, parallel = {**LAYOUTS, "cp2": (2, {"cp": 2})}[layout]
    tied = {"model__tie_embeddings": True}
    ((expected, _, names),) = run_ranks(1, regress, tiny_config(tmp_path, **tied), head)
    assert ("output_layer.weight" in names) == (head == "value")
    assert expected[0] != expected[2]
    for found, samples, _ in run_ranks(ranks, regress, tiny_config(tmp_path, parallel=parallel, **tied), head):
        # Adam turns rounding into signs where a gradient is nearly 0: later steps differ by more.
        assert found == [pytest.approx(step, rel=rel) for step, rel in zip(expected, (1e-5, 1e-4, 1e-3), strict=True)]
        assert samples in ([], ["length"])


def learn_pairs(config, kinds):
    """Losses, norms, rewards and samples of two pairs in two rows, on each of the layouts."""
    found = []
    for parallel in kinds:
        with parallel_context(config.parallel.model_copy(update=parallel)) as ctx:
            for objective in (
                Preference(DirectPreference(kind="dpo", reference="none")),
                Reward(RewardModel(kind="reward")),
            ):
                head = "value" if isinstance(objective, Reward) else "language_model"
                numbers = {"parallel": ctx.layout, "seq_length": 16, "micro_batch_size": 2, "head": head}
                engine = Engine.build(
                    dataclasses.replace(ModelSpec.of(config), **numbers), ctx, optimizer=config.optimizer
                )
                extras = {"weights": torch.ones(2), "margins": torch.zeros(2)}
                pairs = dataclasses.replace(documents(2)[1], lengths=torch.tensor(LENGTHS), extras=extras)
                outputs = engine.forward_backward(iter([pairs]), objective, 1)
                sums = NamedSum(ctx)({"square": outputs.grad_square, **outputs.sums})
                samples = [s for s in ctx.gather({k: v.tolist() for k, v in outputs.samples.items()}) if s]
                found.append((sums, samples))
    return found


def test_objectives_on_pairs_learn_whole_rows_from_context_parallel_ranks(tmp_path):
    (one,) = run_ranks(1, learn_pairs, tiny_config(tmp_path), [{}])
    for found in run_ranks(2, learn_pairs, tiny_config(tmp_path), [{"cp": 2}, {"cp": 2, "cp_kind": "a2a"}]):
        for (sums, samples), (expected, expected_samples) in zip(found, one * 2, strict=True):
            assert sums == pytest.approx(expected, rel=1e-5)
            assert samples == [{k: pytest.approx(v, rel=1e-5) for k, v in s.items()} for s in expected_samples]


class WholeRows(Regression):
    """An objective that does not say how it takes a part of a row."""

    cut: Cut = None


def learn_whole_rows(config):
    with parallel_context(config.parallel) as ctx:
        spec = dataclasses.replace(ModelSpec.of(config), head="value")
        engine = Engine.build(spec, ctx, optimizer=config.optimizer)
        with pytest.raises(ConfigError) as error:
            engine.forward_backward(iter([]), WholeRows(), 1)
        return str(error.value)


def test_an_objective_of_whole_rows_is_refused_with_context_parallelism(tmp_path):
    for said in run_ranks(2, learn_whole_rows, tiny_config(tmp_path, parallel={"cp": 2})):
        assert said.startswith("parallel.cp is 2, and the objective (squared error) takes whole rows: use cp 1")


def refusals(config):
    """What core attention says to a mask, a bias and another mask type."""
    from megatron.core.transformer.enums import AttnMaskType

    with parallel_context(config.parallel) as ctx:
        (model,) = build_chunks(ModelSpec.of(config), ctx)
        core, said = model.decoder.layers[0].self_attention.core_attention, []
        q, k = torch.zeros(4, 1, 4, 16), torch.zeros(4, 1, 2, 16)
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        for call in (
            lambda: core(q, k, k, mask),
            lambda: core(q, k, k, None, attention_bias=mask.float()),
            lambda: core(q, k, k, None, attn_mask_type=AttnMaskType.no_mask),
            lambda: core(q, k, k, None, unknown=1),
        ):
            try:
                call()
                said.append("computed")
            except (ValueError, TypeError) as error:
                said.append(str(error))
        return said


def test_core_attention_refuses_what_it_does_not_compute(tmp_path):
    ((mask, bias, kind, unknown),) = run_ranks(1, refusals, tiny_config(tmp_path))
    assert mask.startswith("attention_mask is given")
    assert bias.startswith("attention_bias is given")
    assert kind == "attn_mask_type is no_mask: core attention computes causal attention only"
    assert "unexpected keyword argument 'unknown'" in unknown
