"""Native logits equal those of transformers, or of our reference for families that it does not ship, on every layout."""

import functools

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.families import tiny
from tests.harness import run_ranks

LAYOUTS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp2 sp": {"tp": 2, "sp": True},
    "ep2": {"ep": 2},  # over two data-parallel ranks
}


def forward(batches, chunk):
    output = chunk(input_ids=next(batches), position_ids=None, attention_mask=None)
    return output, lambda logits, non_loss_data: logits


def native_logits(folders, parallel, ids):
    """{name: (tp rank, logits [b, s, v/tp])} of the last stage; {} elsewhere."""
    found = {}
    with parallel_context(Parallel(**parallel)) as ctx:
        for folder in folders:
            source = HfFolder(folder)
            spec = ModelSpec(arch=source.arch, parallel=ctx.layout, seq_length=ids.shape[1], micro_batch_size=len(ids))
            chunk = Engine.build(spec, ctx, source=source).model
            with torch.no_grad():
                (logits,) = get_forward_backward_func()(
                    forward_step_func=forward,
                    data_iterator=iter([ids]),
                    model=chunk.eval(),
                    num_microbatches=1,
                    seq_length=ids.shape[1],
                    micro_batch_size=len(ids),
                    forward_only=True,
                    collect_non_loss_data=True,
                ) or [None]
            if ctx.is_last_stage:
                found[folder.name] = (ctx.tp_rank, logits.numpy())
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return [tiny.make(name, root) for name in tiny.ALL]


@functools.cache
def expected(folder):
    return tiny.reference_logits(folder, tiny.ids())


def runs(name, parallel):
    """Whether a layout is one for the folder: experts need SP beside tensor parallelism, and ep needs experts."""
    mixture = name in tiny.MIXTURES
    return mixture if "ep" in parallel else not (mixture and "tp" in parallel and not parallel.get("sp"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_logits_equal_the_reference_of_every_family(layout, folders):
    parallel = LAYOUTS[layout]
    folders = [folder for folder in folders if runs(folder.name, parallel)]
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("ep", 1)
    results = run_ranks(ranks, native_logits, folders, parallel, tiny.ids())
    wrong = {}
    for folder in folders:
        shards = dict(rank[folder.name] for rank in results if folder.name in rank)
        assert len(shards) == parallel.get("tp", 1)
        logits = torch.cat([torch.from_numpy(shards[rank]) for rank in sorted(shards)], dim=-1)
        vocab = tiny.SHAPE["vocab_size"]
        assert (logits[..., vocab:] == float("-inf")).all()  # padding is never predicted
        reference = expected(folder)
        assert reference.abs().max() > 1  # or the comparison would say little
        difference = (logits[..., :vocab] - reference).abs().max().item()
        if not difference < 1e-4:
            wrong[folder.name] = difference
    assert not wrong
