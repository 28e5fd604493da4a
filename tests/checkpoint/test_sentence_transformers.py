"""Exported embedding models: sentence-transformers computes our vectors, and its folders are read back."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from flagscale_like.checkpoint.format import is_embedder
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.sentence_transformers import read_text_settings
from flagscale_like.data.preprocess import preprocess_groups
from flagscale_like.data.shards import GroupOptions
from flagscale_like.errors import ConversionError
from tests.commands import run_commands
from tests.data.chats import make_tokenizer
from tests.data.groups import write_groups
from tests.data.retrieval import write_records
from tests.harness import tiny_config, write_yaml

QUERY, PASSAGE = "find: ", "text: "
TEXTS = ["a", "where is abc?", "abcdefgh " * 9 + "end", "hgfedcba is here", "ab cd ef gh"]


def cases():
    """Options of a run and of its data, by name. Each run has the sources of `end` or of `plain` texts."""
    return {
        "last": ("end", {}, {"pooling": "last"}),
        "mean": ("plain", {}, {"pooling": "mean"}),
        "first": ("plain", {"model__attention": "bidirectional"}, {"pooling": "first"}),
        "both": ("end", {"model__attention": "bidirectional"}, {"pooling": "mean"}),
        "lora": ("end", {"lora": {"rank": 2}, "optimizer__lr": 0.05}, {"pooling": "last"}),
    }


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Trained for two steps, exported and asked for vectors: what each command printed, by the name of the case."""
    work = tmp_path_factory.mktemp("st")
    tokenizer = make_tokenizer(work / "tok")
    path = write_groups(work / "in.jsonl", 40)
    options = GroupOptions(24, 24, QUERY, PASSAGE)
    sources = {
        end: preprocess_groups([path], tokenizer, work / end, options, end=end == "end") for end in ("end", "plain")
    }
    write_records(work / "texts.jsonl", [{"text": text} for text in TEXTS])
    lines, names = [], []
    for name, (kind, changes, objective) in cases().items():
        base = {"checkpoint__load": str(work / "last")} if name == "lora" else {}
        config = tiny_config(
            work / name,
            data={"sources": [{"path": str(work / kind)}], "tokenizer": str(sources[kind][1]), "split": "100,0,0"},
            objective={"kind": "contrastive", "passages": 2, **objective},
            model__vocab_size=300,
            model__num_layers=2,
            train__seq_length=96,
            train__steps=2,
            train__eval_interval=0,
            **{**base, **changes},
        )
        write_yaml(config, work / f"{name}.yaml")
        out, merge = work / f"{name}-hf", ["--merge"] if name == "lora" else []
        export = ["convert", "export", "--checkpoint", str(work / name), "--out", str(out), "--dtype", "fp32"]
        lines.append(["train", str(work / f"{name}.yaml")])
        lines.append([*export, "--sentence-transformers", *merge])
        for side in ("query", "passage"):
            embed = ["embed", str(work / "texts.jsonl"), "--side", side]
            lines.append([*embed, "--checkpoint", str(work / name), "--out", str(work / f"{name}-{side}.npy")])
        lines.append([*embed, "--hf", str(out), "--out", str(work / f"{name}-hf.npy")])
        names += [name] * 5
    (found,) = run_commands(lines)
    for name, line, outcome in zip(names, lines, found, strict=True):
        assert outcome.exit_code == 0, f"{name}: {' '.join(line)}: {outcome.error}"
    return work, dict(zip([(n, i % 5) for i, n in enumerate(names)], found, strict=True))


@pytest.mark.parametrize("name", cases())
def test_sentence_transformers_computes_our_vectors(name, exports):
    work, outcomes = exports
    model = SentenceTransformer(str(work / f"{name}-hf"), device="cpu")
    assert model.max_seq_length == 24
    for side, prompt in (("query", "query"), ("passage", "document")):
        ours = np.load(work / f"{name}-{side}.npy")
        for batch_size in (1, 8):  # alone, and padded
            theirs = model.encode(TEXTS, prompt_name=prompt, batch_size=batch_size, normalize_embeddings=False)
            assert np.abs(1 - (ours * theirs).sum(1)).max() < 1e-6, (side, batch_size)
    again = np.load(work / f"{name}-hf.npy")  # of the passages, read back from the folder
    assert np.abs(1 - (ours * again).sum(1)).max() < 1e-6
    exported = outcomes[name, 1].printed
    assert "verified: transformers' hidden states differ from the native model's by" in exported
    assert f"prompts {{'query': '{QUERY}', 'document': '{PASSAGE}'}}" in exported
    assert "the tokenizer has no padding token: the export pads with <|im_end|>" in exported


def test_an_export_has_no_output_layer_and_comes_back(exports, tmp_path):
    work, _ = exports
    folder = HfFolder(work / "last-hf")
    assert is_embedder(folder)
    assert json.loads((work / "last-hf" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert not [name for rule in folder.rules for name in rule.hf if name.startswith(("model.", "lm_head"))]
    native, out = str(tmp_path / "native"), str(tmp_path / "again")
    back = ["convert", "import", "--hf", str(work / "last-hf"), "--out", native]
    export = ["convert", "export", "--checkpoint", native, "--out", out, "--dtype", "fp32"]
    again = [*export, "--sentence-transformers"]
    wrong = ["evaluate", "--hf", str(work / "last-hf"), "--data", str(work / "texts.jsonl")]
    ((imported, unknown, exported, refused),) = run_commands([back, again, [*again, "--pooling", "last"], wrong])
    assert imported.exit_code == 0, imported.error
    assert "does not say how it pools: give --pooling" in unknown.error
    assert exported.exit_code == 0, exported.error
    assert (
        "note: nothing is known to go before texts; if something does, give --query-instruction and" in exported.printed
    )
    weights = [(folder / "model.safetensors").read_bytes() for folder in (work / "last-hf", tmp_path / "again")]
    assert weights[0] == weights[1]
    assert "output_layer.weight" in refused.error


def test_folders_of_sentence_transformers_are_read_and_others_refused(exports, tmp_path):
    work, _ = exports
    SentenceTransformer(str(work / "mean-hf"), device="cpu").save(str(tmp_path / "saved"))
    own, saved = (read_text_settings(folder) for folder in (work / "mean-hf", tmp_path / "saved"))
    assert (saved.pooling, dict(saved.prompts), saved.max_tokens) == (own.pooling, dict(own.prompts), own.max_tokens)
    assert HfFolder(tmp_path / "saved").embedder
    path = tmp_path / "saved" / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode_max_tokens": True}))
    with pytest.raises(
        ConversionError, match="pools by pooling_mode_max_tokens: supported: last token, mean, first token"
    ):
        read_text_settings(tmp_path / "saved")
    (tmp_path / "saved" / "modules.json").write_text(json.dumps([{"type": "a.Transformer"}, {"type": "a.Dense"}]))
    with pytest.raises(ConversionError, match=r"modules.json: has Transformer, Dense: supported: Transformer, Pooling"):
        read_text_settings(tmp_path / "saved")
