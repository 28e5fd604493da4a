"""Contrastive learning by gradient caching: the gradient of the whole batch, on every layout, equal to direct autograd."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from flagscale_like.arch import Experts
from flagscale_like.config import Contrastive, Lora
from flagscale_like.data.batch import Batch, collate
from flagscale_like.engine.engine import Engine
from flagscale_like.engine.objective import Loss
from flagscale_like.model.offload import ActivationOffload
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.contrastive import ContrastiveLoss
from flagscale_like.objectives.embedding import TextVectors
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.reduction import NamedSum
from tests.harness import run_ranks, tiny_config
from tests.objectives.contrastive import contrastive_loss

PASSAGES, LENGTH = 3, 32
GROUPS = (2, 1, 2, 1, 1, 2, 1, 2)  # of each row: the ranks' parts of a batch are not of one size
OPTIONS: dict[str, Any] = {
    "passages": PASSAGES,
    "temperature": 0.05,
    "false_negative_margin": 0.3,
    "dimensions": [16, 32],
}
OPTIONS |= {"symmetric": True, "distill": 0.5, "distill_kind": "stable"}


def row(number, step=0):
    """A pack of whole groups, with padding behind the last text."""
    random = torch.Generator().manual_seed(1000 * step + number)
    texts = GROUPS[number] * (1 + PASSAGES)
    lengths = torch.randint(1, LENGTH // texts, (texts,), generator=random)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    bounds[-1] = LENGTH
    tokens = torch.randint(0, 250, (LENGTH,), generator=random)
    return {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.zeros(LENGTH),
        "documents": bounds.int(),
        "lengths": lengths,
        "extras": {
            "texts": torch.randint(0, 40, (texts,), generator=random),  # some are equal
            "teacher": torch.randn(GROUPS[number] * PASSAGES, generator=random),
        },
    }


def batches_of(ctx, micro, step=0):
    """This data-parallel rank's micro-batches, of `micro` rows each."""
    mine = [row(number, step) for number in range(len(GROUPS))]
    mine = mine[ctx.dp_rank * len(mine) // ctx.dp : (ctx.dp_rank + 1) * len(mine) // ctx.dp]
    for first in range(0, len(mine), micro):
        yield Batch.of(collate(mine[first : first + micro]), ctx.platform.device, torch.zeros(micro, dtype=torch.int64))


class Direct(TextVectors):
    """The same loss by autograd through all groups of a rank, which are one micro-batch. Parts share no negatives."""

    metric, sums = "direct", ()

    def __init__(self, options, parts=1):
        super().__init__(options.pooling)
        self.options, self.parts, self.documents_in_one = options, parts, 1 + PASSAGES

    def loss(self, output, batch):
        vectors = self.vectors(output, batch)
        half = sum(GROUPS[: len(GROUPS) // self.parts])  # the groups of the first rows
        sizes = [half, sum(GROUPS) - half] if self.parts == 2 else [half]
        split = [
            x.split([n * size for n in sizes])
            for x, size in (
                (vectors, 1 + PASSAGES),
                (batch.extras["texts"], 1 + PASSAGES),
                (batch.extras["teacher"], PASSAGES),
            )
        ]
        losses = torch.cat([contrastive_loss(*part, self.options) for part in zip(*split, strict=True)])
        return Loss(losses.sum(), self.row_counts(batch).sum())


class Watched(ContrastiveLoss):
    """Keeps the vectors that it is asked for."""

    def __init__(self, options):
        super().__init__(options)
        self.seen = []

    def vectors(self, output, batch):
        self.seen.append(super().vectors(output, batch))
        return self.seen[-1]


def learn(config, cases):
    """(numbers of each of two steps, how many vectors the passes of the last one made, and whether twice the same)."""
    found = []
    for case in cases:
        layout = config.parallel.model_copy(update=case.get("parallel", {}))
        with parallel_context(layout) as ctx:
            options = Contrastive(kind="contrastive", **{**OPTIONS, **case.get("options", {})})
            micro, parts = case["micro"], case.get("direct", 0)
            numbers = {name: case[name] for name in ("recompute", "precision", "lora") if name in case}
            numbers |= {"parallel": layout, "seq_length": LENGTH, "micro_batch_size": micro, "head": "hidden"}
            numbers |= {"arch": config.model.model_copy(update=case.get("arch", {}))}
            spec = dataclasses.replace(ModelSpec.of(config), **numbers)
            engine, add_up, steps = Engine.build(spec, ctx, optimizer=config.optimizer), NamedSum(ctx), []
            if case.get("offload"):
                offload = ActivationOffload(ctx.platform, share=1.0, min_tensor_bytes=0)
                for model in engine.models:
                    offload.attach(model.decoder, model.config)
            for step in range(2):
                objective = Direct(options, parts) if parts else Watched(options)
                count = len(GROUPS) // ctx.dp // micro
                outputs = engine.forward_backward(batches_of(ctx, micro, step), objective, count)
                sums = add_up({"square": outputs.grad_square, **outputs.sums})
                numbers = {name: value / sums["count"] for name, value in sums.items() if name != "square"}
                rows = [value for r in ctx.gather(outputs.samples) if "loss" in r for value in r["loss"].tolist()]
                steps.append((numbers | {"norm": math.sqrt(sums["square"])}, rows))
                engine.update(clip=0.0, grad_norm=1.0)
            seen = [] if parts else objective.seen
            twice = len(seen) - count  # the micro-batches of the first pass
            same = [torch.equal(one, two) for one, two in zip(seen, seen[len(seen) - twice :], strict=False)][:twice]
            assert not case.get("offload") or offload.stats.bytes_in
            found.append((steps, len(seen), all(same)))
    return found


FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
LORA = Lora(rank=4, alpha=8)
EXPERTS = {"experts": Experts(count=4, top_k=2, ffn_hidden_size=24, balance="sequence", coefficient=0.1)}
# What each case is to be equal to, by its number of ranks.
LAYOUTS = {
    1: {
        "one pass": ("direct", {"micro": 8}),
        "micro-batches of a row": ("direct", {"micro": 1}),
        "full recompute": ("direct", {"micro": 2, **FULL}),
        "selective recompute, offload": ("direct", {"micro": 2, "offload": True, **SELECTIVE}),
        "bf16": ("bf16", {"micro": 2, "precision": "bf16"}),
        "lora": ("lora", {"micro": 2, "lora": LORA}),
        "experts, full recompute": ("experts", {"micro": 1, "arch": EXPERTS, **FULL}),
    },
    2: {
        "dp2": ("direct", {"micro": 2}),
        "dp2 one pass": ("direct", {"micro": 4}),
        "dp2 negatives of a rank": ("batch", {"micro": 2, "options": {"negatives": "batch"}}),
        "dp2 own negatives": ("given", {"micro": 2, "options": {"negatives": "given", "symmetric": False}}),
        "tp2": ("direct", {"micro": 2, "parallel": {"tp": 2}}),
        "tp2 sp": ("direct", {"micro": 4, "parallel": {"tp": 2, "sp": True}, **FULL}),
        "pp2": ("direct", {"micro": 2, "parallel": {"pp": 2}}),
        "pp2 one micro-batch": ("direct", {"micro": 8, "parallel": {"pp": 2}}),
        "pp2 vpp2": ("direct", {"micro": 2, "parallel": {"pp": 2, "vpp": 2}}),
        "cp2": ("direct", {"micro": 2, "parallel": {"cp": 2}}),
        "cp2 a2a": ("direct", {"micro": 8, "parallel": {"cp": 2, "cp_kind": "a2a"}}),
        "lora tp2": ("lora", {"micro": 4, "lora": LORA, "parallel": {"tp": 2}}),
    },
    4: {
        "dp2 tp2 sp": ("direct", {"micro": 1, "parallel": {"tp": 2, "sp": True}}),
        "dp2 pp2 vpp2": ("direct", {"micro": 2, "parallel": {"pp": 2, "vpp": 2}, **FULL}),
        "pp2 tp2 sp ep2, experts": (
            "experts",
            {"micro": 1, "arch": EXPERTS, "parallel": {"pp": 2, "tp": 2, "sp": True, "ep": 2}, **FULL},
        ),
        "dp2 cp2": ("direct", {"micro": 2, "parallel": {"cp": 2}}),
    },
}
EXPECTED = {
    "direct": {"micro": 8, "direct": 1},
    "bf16": {"micro": 8, "direct": 1, "precision": "bf16"},
    "lora": {"micro": 8, "direct": 1, "lora": LORA},
    "experts": {"micro": 8, "direct": 1, "arch": EXPERTS},
    "batch": {"micro": 8, "direct": 2, "options": {"negatives": "batch"}},
    "given": {"micro": 8, "direct": 1, "options": {"negatives": "given", "symmetric": False}},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The steps of direct autograd, by name, and the sums and rows of one pass."""
    config = tiny_config(tmp_path_factory.mktemp("direct"))
    (found,) = run_ranks(1, learn, config, [*EXPECTED.values(), LAYOUTS[1]["one pass"][1]])
    return {name: steps for name, (steps, _, _) in zip([*EXPECTED, "one pass"], found, strict=True)}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_learns_the_whole_batch_as_direct_autograd_does(ranks, expected, tmp_path):
    cases = LAYOUTS[ranks]
    for found in run_ranks(ranks, learn, tiny_config(tmp_path), [case for _, case in cases.values()]):
        for (name, (wanted, case)), (steps, seen, same) in zip(cases.items(), found, strict=True):
            # Adam turns rounding into signs where a gradient is nearly 0: the second step differs by more.
            for (numbers, rows), (direct, _), rel in zip(steps, expected[wanted], (1e-5, 1e-3), strict=True):
                rel = (2e-2 if steps[0][0] is numbers else 0.2) if "precision" in case else rel
                assert {key: numbers[key] for key in direct} == pytest.approx(direct, rel=rel), name
                assert sum(rows) == pytest.approx(numbers["total"] * sum(GROUPS), rel=1e-5), name
            assert same, name
            if wanted == "direct":  # the other numbers, and the losses of the rows in their order
                numbers, rows = expected["one pass"][0]
                assert steps[0] == (pytest.approx(numbers, rel=1e-5), pytest.approx(rows, rel=1e-5)), name
            if "vpp" not in case.get("parallel", {}) and seen:  # all but the first micro-batch run twice
                count = len(GROUPS) // case["micro"] // (2 if "dp2" in name else 1)
                assert seen == 2 * count - 1, name


def test_the_second_pass_draws_the_dropout_masks_of_the_first(tmp_path):
    dropped = Lora(rank=4, alpha=8, dropout=0.5)
    cases = [{"micro": 2, "lora": dropped, **more} for more in ({}, FULL, {"parallel": {"pp": 2}})]
    cases += [{"micro": 2, "lora": dropped, "parallel": {"pp": 2, "vpp": 2}}]
    for ranks, chosen in ((1, cases[:2]), (2, cases[2:])):
        for found in run_ranks(ranks, learn, tiny_config(tmp_path), chosen):
            assert all(same for _, _, same in found)
