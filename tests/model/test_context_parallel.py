"""Context parallelism: from parts of rows every layout learns what one process learns from whole rows."""

import itertools
import math

import numpy as np
import pytest
import torch

from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import Engine
from flagscale_like.model.offload import attach_offload
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.next_token import NextToken
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.runtime.row_cut import RowCut
from tests.harness import run_ranks, tiny_config

STEPS, ROWS, LENGTH = 2, 4, 64
DOCUMENTS = (5, 1, 24, 11, 23)  # none of them is a multiple of a chunk

NLPE = {"kind": "nlpe", "threshold": 10}
DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
ARCHS = {
    "rope": {},
    "alibi": {"model__position": {"kind": "alibi"}},
    "window": {"model__sliding_window": 20},
    "nlpe, clipped": {"model__position": NLPE},
    "nlpe, compressed": {"model__position": {**NLPE, "far": "compressed", "far_factor": 4.0}},
    "dynamic": {"model__position": {"scaling": DYNAMIC}},
    "qk norm, tied, frozen": {
        "model__qk_norm": True,
        "model__tie_embeddings": True,
        "train__frozen": ["decoder.layers.0.*"],
    },
}
FUSED = {"kernels__linear_cross_entropy": "fused"}
OFFLOAD = {"offload": {"share": 1.0, "min_tensor_bytes": 0}}
FULL, SELECTIVE = {"train__recompute": "full"}, {"train__recompute": "selective"}
# Layout; then (architecture, packs of documents, rows of a micro-batch, other changes) of each run on it.
LAYOUTS = {
    "cp4": ({"cp": 4}, [("rope", True, 2, {}), ("nlpe, clipped", True, 1, FULL), ("alibi", False, 2, {})]),
    "cp2 dp2": (
        {"cp": 2},
        [
            ("dynamic", True, 2, {}),
            ("window", False, 1, OFFLOAD),
            ("window", True, 2, SELECTIVE),
            ("nlpe, compressed", False, 2, {}),
            ("qk norm, tied, frozen", True, 1, FULL),
        ],
    ),
    "tp2 sp cp2": ({"tp": 2, "sp": True, "cp": 2}, [("rope", True, 2, FUSED), ("alibi", True, 1, {})]),
    "pp2 cp2": ({"pp": 2, "cp": 2}, [("rope", True, 2, FULL), ("qk norm, tied, frozen", False, 1, {})]),
    "pp2 vpp2 cp2": ({"pp": 2, "vpp": 2, "cp": 2}, [("rope", False, 1, SELECTIVE), ("alibi", True, 1, OFFLOAD)]),
    "pp2 uneven cp2": ({"pp": 2, "first_stage_layers": 1, "cp": 2}, [("rope", True, 1, {})]),
    "a2a dp2": (
        {"cp": 2, "cp_kind": "a2a"},
        [
            ("rope", True, 2, FULL),
            ("nlpe, clipped", True, 1, {}),
            ("alibi", True, 2, OFFLOAD),
            ("dynamic", False, 1, {}),
        ],
    ),
    "a2a pp2": ({"cp": 2, "cp_kind": "a2a", "pp": 2}, [("qk norm, tied, frozen", True, 2, SELECTIVE)]),
}


def batches(step, rows, packed, ctx):
    for turn in range(ROWS // rows // ctx.dp):
        place = turn * ctx.dp + ctx.dp_rank
        # Any rows of a step, however they are put into micro-batches.
        tokens = torch.stack(
            [
                torch.randint(0, 250, (LENGTH + 1,), generator=torch.Generator().manual_seed(1000 * step + row))
                for row in range(place * rows, (place + 1) * rows)
            ]
        )
        yield Batch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=(tokens[:, 1:] % 7 > 0).float(),
            documents=torch.tensor([0, *itertools.accumulate(DOCUMENTS * rows)], dtype=torch.int32) if packed else None,
            source=torch.arange(place * rows, (place + 1) * rows),
        )


def learn(config, packed, ctx):
    """[(loss, gradient norm, tokens)] of the steps; and (row, loss, tokens) of the last step's, as the ranks count them."""
    engine = Engine.build(ModelSpec.of(config), ctx, optimizer=config.optimizer)
    offload = attach_offload(engine.models, config, ctx)
    objective, rows, found = NextToken(packed=packed), config.train.micro_batch_size, []
    for step in range(STEPS):
        outputs = engine.forward_backward(batches(step, rows, packed, ctx), objective, ROWS // rows // ctx.dp)
        sums = NamedSum(ctx)({"square": outputs.grad_square, **outputs.sums})
        engine.update(clip=1.0, grad_norm=math.sqrt(sums["square"]))
        found.append((sums["total"] / sums["count"], math.sqrt(sums["square"]), sums["count"]))
    named = ("source", "loss", "tokens")
    own = list(zip(*(outputs.samples[name].tolist() for name in named), strict=True)) if outputs.samples else []
    counted = [sample for samples in ctx.gather(own) for sample in samples]
    assert offload is None or offload.report()["bytes_out"] > 0
    return found, sorted(counted)


def learn_all(runs):
    """The runs in order; those of one layout share a launch."""
    torch.set_num_threads(1)
    found = []
    for layout, group in itertools.groupby(runs, key=lambda run: run[0].parallel):
        with parallel_context(layout) as ctx:
            found += [learn(config, packed, ctx) for config, packed in group]
    return found


def config_of(folder, arch, rows, parallel, changes):
    fixed = {"train__global_batch_size": ROWS, "train__seq_length": LENGTH, "optimizer__lr": 1e-3}
    return tiny_config(folder, parallel=parallel, train__micro_batch_size=rows, **{**fixed, **ARCHS[arch], **changes})


def test_every_layout_learns_parts_of_rows_as_one_process_learns_whole_rows(tmp_path):
    names = [
        (layout, arch, packed, rows, changes)
        for layout, (_, runs) in LAYOUTS.items()
        for arch, packed, rows, changes in runs
    ]
    alone = sorted({(arch, packed) for _, arch, packed, *_ in names})
    (expected,) = run_ranks(1, learn_all, [(config_of(tmp_path, arch, 1, {}, {}), packed) for arch, packed in alone])
    expected = dict(zip(alone, expected, strict=True))
    runs = [
        (config_of(tmp_path, arch, rows, LAYOUTS[layout][0], changes), packed)
        for layout, arch, packed, rows, changes in names
    ]
    for results in run_ranks(4, learn_all, runs, timeout_s=300):
        for name, (steps, samples) in zip(names, results, strict=True):
            one, one_samples = expected[name[1], name[2]]
            np.testing.assert_allclose(steps, one, rtol=1e-5, err_msg=str(name))
            np.testing.assert_allclose(samples, one_samples, rtol=1e-5, err_msg=str(name))


def test_bf16_is_no_further_from_fp32_than_one_process_is(tmp_path):
    """Over the architectures: the mean distance of loss and gradient norm from the fp32 run of one process."""
    kinds = [("rope", True), ("alibi", False), ("nlpe, clipped", False), ("window", True)]

    def runs(parallel, precision):
        return [
            (config_of(tmp_path, arch, 1, parallel, {"train__precision": precision}), packed) for arch, packed in kinds
        ]

    (one,) = run_ranks(1, learn_all, runs({}, "fp32") + runs({}, "bf16"))
    fp32, bf16 = (np.array([steps for steps, _ in part]) for part in (one[: len(kinds)], one[len(kinds) :]))
    gathered = run_ranks(2, learn_all, runs({"cp": 2}, "bf16") + runs({"cp": 2, "cp_kind": "a2a"}, "bf16"))[0]
    allowed = np.abs(bf16 / fp32 - 1).mean((0, 1))
    for part in (gathered[: len(kinds)], gathered[len(kinds) :]):
        apart = np.abs(np.array([steps for steps, _ in part]) / fp32 - 1).mean((0, 1))
        assert (apart[:2] <= 1.5 * allowed[:2]).all(), (apart, allowed)


@pytest.mark.parametrize(
    ("zigzag", "parts"), [(True, [[0, 1, 6, 7], [2, 3, 4, 5]]), (False, [[0, 1, 2, 3], [4, 5, 6, 7]])]
)
def test_a_rank_holds_a_chunk_from_the_front_and_its_mirror_image_or_one_chunk(zigzag, parts):
    row = torch.arange(8)[None]
    assert [RowCut(rank, 2, zigzag, None).part(row, 1)[0].tolist() for rank in range(2)] == parts


def test_a_part_of_a_batch_keeps_the_bounds_of_whole_rows_and_what_is_not_of_its_tokens():
    tokens = torch.arange(16).view(2, 8)
    extras = {"target": tokens.float()[..., None], "score": torch.ones(2)}
    whole = Batch(
        tokens=tokens, labels=tokens, loss_mask=torch.ones(2, 8), documents=torch.tensor([0, 8, 16]), extras=extras
    )
    part = whole.part_of(RowCut(0, 2, True, None))
    assert part.tokens.tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert part.extras["target"].shape == (2, 4, 1)
    assert part.extras["score"].shape == (2,)
    assert part.documents.tolist() == [0, 8, 16]
