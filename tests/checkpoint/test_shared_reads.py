"""Ranks that hold the same weights read each part once, send it to each other, and fail together."""

import errno

import pytest

from flagscale_like.checkpoint import dealing
from flagscale_like.checkpoint.dealing import LARGEST, SMALLEST, deal
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.tensor_file import TensorFile
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.run import start
from tests import faults
from tests.checkpoint.test_layouts import assert_read_whole, count_reads
from tests.harness import run_ranks, tiny_config

BF16 = {"train__precision": "bf16", "model__num_query_groups": 4}
EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 40}
ELEMENTS = 4 * (4 * 64 * 64 + 3 * 96 * 64 + 2 * 64) + 2 * 256 * 64 + 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks with a checkpoint after step 3."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    run_ranks(2, faults.train_run, tiny_config(folder, train__steps=3, **BF16))
    return folder


def dealt(sizes, replicas):
    """What each replica reads, after a check that all is read once, in order, and cut at the grain alone."""
    parts = list(deal(sizes, replicas))
    for number, (numel, grain) in enumerate(sizes):
        own = [part for part in parts if part.number == number]
        assert [0, *(part.stop for part in own)] == [*(part.start for part in own), numel]
        assert all(part.start % grain == 0 and part.stop - part.start <= max(grain, LARGEST) for part in own)
    assert [part.reader for part in parts] == sorted(part.reader for part in parts)
    return [sum(part.stop - part.start for part in parts if part.reader == replica) for replica in range(replicas)]


def test_replicas_read_equal_runs_and_what_cannot_be_cut_is_read_by_one():
    embedding, matrix = 128 * SMALLEST, 12 * SMALLEST
    anywhere = [(embedding, 1), *[(matrix, 1), (64, 1)] * 8, (embedding, 1)]
    assert max(found := dealt(anywhere, 16)) - min(found) <= 1
    whole = dealt([(numel, numel) for numel, _ in anywhere], 4)
    assert max(whole) == embedding
    assert dealt([(matrix, matrix // 12)] * 3, 5) == [
        7 * SMALLEST,
        7 * SMALLEST,
        8 * SMALLEST,
        7 * SMALLEST,
        7 * SMALLEST,
    ]
    assert dealt([(64, 1), (SMALLEST, 1)], 4) == [SMALLEST + 64, 0, 0, 0]  # too little to be shared
    assert dealt([(5 * LARGEST // 2, 1)], 1) == [5 * LARGEST // 2]
    assert dealt([], 2) == [0, 0]


def load_weights(config, source):
    """Build a model from a source; elements read out of a checkpoint, or names of Hugging Face tensors."""
    dealing.SMALLEST = 64  # so that each rank reads something of a tiny model
    reads, names, tensor = count_reads(), [], HfFolder.hf_tensor

    def counted(folder, name, **options):
        names.append(name)
        return tensor(folder, name, **options)

    HfFolder.hf_tensor = counted
    with parallel_context(config.parallel) as ctx:
        engine = Engine.build(ModelSpec.of(config), ctx, source=source)
        found = names[:] or [elements for elements, _ in reads]
        assert_read_whole(engine, source)
        return found


def test_weights_of_a_checkpoint_are_read_once_over_all_replicas(run, tmp_path):
    source = CheckpointReader(run / "checkpoints" / "step_00000003")
    found = run_ranks(4, load_weights, tiny_config(tmp_path, **BF16), source)
    assert sum(map(sum, found)) == ELEMENTS
    assert min(map(sum, found)) >= ELEMENTS // 4 - 1


@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
def test_each_tensor_of_a_hugging_face_folder_is_read_by_one_replica(experts, run, tmp_path):
    checkpoint, config = run / "checkpoints" / "step_00000003", tiny_config(tmp_path, **BF16)
    if experts is not None:
        changes = {**BF16, "model__family": "mixtral", "model__experts": experts, "parallel": {"ep": 2}}
        config = tiny_config(tmp_path / "moe", train__steps=2, **changes)
        run_ranks(2, faults.train_run, config)
        checkpoint = tmp_path / "moe" / "checkpoints" / "step_00000002"
    export(CheckpointReader(checkpoint), tmp_path / "hf")
    source = HfFolder(tmp_path / "hf")
    found = run_ranks(4, load_weights, config, source)
    assert all(found)
    names = [spec.name for spec in source.specs()]
    assert sorted(name for names in found for name in names) == sorted(names)


def fail_on_rank_1(config):
    """Begin a run while the disk fails for rank 1; what each rank says."""
    dealing.SMALLEST = 64
    with parallel_context(config.parallel) as ctx:
        if ctx.rank == 1:

            def broken(file, name, first, out):
                raise OSError(errno.EIO, "Input/output error", str(file.path))

            TensorFile.read_into = broken
        try:
            start(config, ctx)
        except CheckpointError as error:
            return str(error)


@pytest.mark.parametrize("resumes", [True, False], ids=["go on", "new run"])
def test_a_disk_that_fails_for_one_rank_ends_all_ranks_with_its_message(resumes, run, tmp_path):
    fp32 = {**BF16, "train__precision": "fp32"}  # what is saved is what is wanted: no page is mapped
    config = tiny_config(run if resumes else tmp_path, **fp32, **({} if resumes else {"checkpoint__load": str(run)}))
    said = run_ranks(2, fail_on_rank_1, config)
    assert said[0] == said[1]
    assert said[0].endswith("safetensors: cannot be read: Input/output error")
