"""Two sources and their tokenizer, for the tests of blends and of pretraining data."""

import pytest

from flagscale_like.data.preprocess import preprocess
from flagscale_like.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, word in (("a", "alpha beta gamma "), ("b", "delta epsilon ")):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i} {word * 20}"}}\n' for i in range(60)))
    tokenizer = train_bpe((p.read_text() for p in folder.glob("*.jsonl")), 280, folder / "tokenizer")
    for name in "ab":
        preprocess([folder / f"{name}.jsonl"], tokenizer.folder, folder / name)
    return folder
