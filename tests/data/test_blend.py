"""The sample index: built once a node, also without shared storage; a failure is every rank's error."""

import os
from pathlib import Path

import numpy as np
import pytest

from flagscale_like.data import blend
from flagscale_like.data.blend import IndexCache, build_split, counts_of, index_folder, source_use
from flagscale_like.data.pretrain import build_dataset, build_datasets, check_sources, micro_batches
from flagscale_like.errors import DataError, required
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import run_ranks, tiny_config


def blend_config(run_dir, corpus, **changes):
    sources = [{"path": str(corpus / "a"), "weight": 3}, {"path": str(corpus / "b"), "weight": 1, "name": "bee"}]
    data = {"sources": sources, "tokenizer": str(corpus / "tokenizer"), "split": "80,10,10", **changes.pop("data", {})}
    return tiny_config(run_dir, model__vocab_size=384, data=data, **changes)


def on_two_nodes(config, private_folders: bool) -> tuple[list[str], int, list[int]]:
    """Four ranks as two nodes of two: the files that this rank wrote, and what it reads."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    if private_folders:
        data = config.data.model_copy(update={"cache_dir": f"{config.run_dir}/node{rank // 2}"})
        config = config.model_copy(update={"data": data})
    written, replace = [], os.replace
    blend.os.replace = lambda source, target: (written.append(Path(target).name), replace(source, target))
    try:
        with parallel_context(config.parallel) as ctx:
            train, valid = build_datasets(config, ctx, train_samples=64, valid_samples=8)
            sample = next(micro_batches(train, config, ctx)).tokens[0].tolist()
    finally:
        blend.os.replace = replace
    return written, len(train) + len(required(valid, "validation data")), sample


@pytest.mark.parametrize("private_folders", [False, True], ids=["shared storage", "a folder a node"])
def test_one_rank_of_each_node_builds_the_index_where_it_is_not_there(tmp_path, corpus, private_folders):
    results = run_ranks(4, on_two_nodes, blend_config(tmp_path, corpus), private_folders)
    wrote = [len(written) for written, *_ in results]
    files = 2 * (2 * 3 + 2)  # train and valid, of each three arrays a source and two of the blend
    assert wrote == ([files, 0, files, 0] if private_folders else [files, 0, 0, 0])
    assert len({total for _, total, _ in results}) == 1
    again = run_ranks(4, on_two_nodes, blend_config(tmp_path, corpus), private_folders)
    assert [written for written, *_ in again] == [[], [], [], []]
    assert [sample for *_, sample in again] == [sample for *_, sample in results]


def failing(config, failing_rank: int, how: str) -> str:
    """What a rank says when the index cannot be had on one."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    data = config.data.model_copy(update={"cache_dir": f"{config.run_dir}/node{rank // 2}"})
    config = config.model_copy(update={"data": data})
    if rank == failing_rank and how == "no folder":
        Path(config.data.cache_dir).write_text("a file where the folder should be")
    if rank == failing_rank and how == "no memory":
        blend.np.save = lambda *_: (_ for _ in ()).throw(MemoryError("no room for the index"))
    try:
        with parallel_context(config.parallel) as ctx:
            build_datasets(config, ctx, train_samples=64, valid_samples=8)
    except DataError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(
    ("failing_rank", "how", "part"),
    [
        (0, "no folder", "the sample index cannot be written to"),
        (2, "no folder", "the sample index cannot be written to"),
        (2, "no memory", "the sample index cannot be built: MemoryError: no room for the index"),
    ],
)
def test_an_index_that_cannot_be_built_on_one_rank_is_every_ranks_error(tmp_path, corpus, failing_rank, how, part):
    said = run_ranks(4, failing, blend_config(tmp_path, corpus), failing_rank, how, timeout_s=60)
    assert len(set(said)) == 1
    assert part in said[0]
    if how == "no folder":
        assert said[0].endswith("set data.cache_dir to a writable folder")
    assert len(said[0].splitlines()) == 1


def in_memory(config, split="train", samples=64):
    return build_split(
        config, required(check_sources(config), "tokenizer"), split, samples, IndexCache(None, may_build=True)
    )


def test_a_blend_holds_its_weights_at_any_point_and_counts_epochs(tmp_path, corpus):
    config = blend_config(tmp_path, corpus)
    data = in_memory(config, samples=400)
    for samples in (40, 100, 400):
        a, b = source_use(data.parts, config.data.source_names, counts_of(data, samples))
        assert (a.name, b.name) == ("a", "bee")
        assert a.samples + b.samples == samples
        assert abs(a.samples - 0.75 * samples) <= 1
    assert a.tokens == a.samples * 32
    assert a.epochs == a.tokens / sum(data.datasets[0].dataset.sequence_lengths[:48])


def test_the_splits_share_no_document(tmp_path, corpus):
    config = blend_config(tmp_path, corpus)
    seen = [
        set(part.indices.tolist()) for s in ("train", "valid", "test") for part in in_memory(config, s, 8).datasets[:1]
    ]
    assert [len(documents) for documents in seen] == [48, 6, 6]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


def test_another_corpus_under_an_old_name_gets_an_index_of_its_own(tmp_path, corpus):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((corpus / f"a{suffix}").read_bytes())
    config = blend_config(tmp_path, corpus, data={"sources": [{"path": str(tmp_path / "a")}]})
    with parallel_context(config.parallel) as ctx:
        build_dataset(config, ctx, "train", 64)
        files = set(index_folder(config).iterdir())
        build_dataset(config, ctx, "train", 64)
        assert set(index_folder(config).iterdir()) == files
        for suffix in (".bin", ".idx"):
            (tmp_path / f"a{suffix}").write_bytes((corpus / f"b{suffix}").read_bytes())
        build_dataset(config, ctx, "train", 64)
        assert len(set(index_folder(config).iterdir())) == 2 * len(files)


def test_a_damaged_index_is_named(tmp_path, corpus):
    config = blend_config(tmp_path, corpus)
    with parallel_context(config.parallel) as ctx:
        build_dataset(config, ctx, "train", 64)
        for path in index_folder(config).glob("*blend*"):
            path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(DataError, match=r"is not a sample index .* remove the file"):
            build_dataset(config, ctx, "train", 64)


def test_data_that_is_used_up_says_so(tmp_path, corpus):
    config = blend_config(tmp_path, corpus)
    with parallel_context(config.parallel) as ctx:
        stream = micro_batches(build_dataset(config, ctx, "train", 12), config, ctx, consumed=10)
        for _ in range(2):
            batch = next(stream)
            assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape
            assert batch.source is not None
        with pytest.raises(DataError, match="all 12 samples that the run planned are read"):
            next(stream)


def test_every_source_has_a_name_of_its_own(corpus, tmp_path):
    sources = [{"path": "x/text"}, {"path": "y/text"}, {"path": "z/other"}, {"path": "z/more", "name": "named"}]
    config = blend_config(tmp_path, corpus, data={"sources": sources})
    assert config.data.source_names == ["x/text", "y/text", "other", "named"]


def test_the_cache_never_shows_half_an_array(tmp_path):
    cache = IndexCache(tmp_path, may_build=True)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fetch("key", ("a", "b"), killed)
    assert not list(tmp_path.glob("*.npy"))
    found = cache.fetch("key", ("a", "b"), lambda: (np.arange(3), np.arange(4)))
    assert [len(array) for array in found] == [3, 4]
    assert len(IndexCache(tmp_path, may_build=False).fetch("key", ("a", "b"), killed)) == 2
    with pytest.raises(DataError, match="the sample index other is missing"):
        IndexCache(tmp_path, may_build=False).fetch("other", ("a",), killed)
