"""Folders as they were published: read, used, trained on, exported, and read again. Their code is never executed."""

import json
import shutil

import pytest
import torch
import transformers
from sentencepiece import SentencePieceProcessor

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.data.tokenizer import Tokenizer, special_ids
from tests.commands import run_commands
from tests.families import published

TEXTS = [
    "A tokenizer folder",
    " two  spaces ",
    "你好，世界 😀é",
    "",
    "\n\n x1234 ",
    "a</s>b <s>",
    "▁ and <0x41> are text",
]
RUN = """
run_dir: run
train: {{steps: 2, micro_batch_size: 1, global_batch_size: 2, seq_length: 16, precision: fp32}}
optimizer: {{lr: 0.001, warmup_steps: 0}}
data: {{sources: [{{path: data}}], tokenizer: "{folder}", split: "1,0,0"}}
checkpoint: {{init_from_hf: "{folder}", interval: 2, export_hf: true}}
"""


def commands(folder):
    text = ["--max-new-tokens", "2", "--prompt", "A tokenizer"]
    return [
        ["preprocess", "text.txt", "--tokenizer", str(folder), "--out", "data"],
        ["train", "run.yaml"],
        ["convert", "import", "--hf", str(folder), "--out", "native"],
        ["convert", "export", "--checkpoint", "native", "--out", "back", "--dtype", "stored"],
        ["generate", "--checkpoint", "run", *text],
        ["evaluate", "--hf", str(folder), "--data", "text.txt", "--seq-length", "16"],
        ["generate", "--checkpoint", "run/hf", *text, "--temperature", "0"],
    ]


@pytest.mark.parametrize("name", published.RELEASES)
def test_a_published_folder_goes_in_and_out(name, tmp_path):
    folder = published.make(name, tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(published.LINES))
    (tmp_path / "run.yaml").write_text(RUN.format(folder=folder))
    (outcomes,) = run_commands(commands(folder), tmp_path)
    for outcome in outcomes:
        assert outcome.exit_code == 0, (outcome.error, outcome.printed)
    pickled = (
        any(path.suffix == ".bin" for path in folder.iterdir())
        and not (folder / "model.safetensors.index.json").exists()
    )
    trusted = "torch.load(weights_only=True), which takes tensors alone; nothing in the folder was executed"
    for number in (1, 2, 5):
        assert (trusted in outcomes[number].printed) is pickled, outcomes[number].printed
    shipped = HfFolder(folder).family.model_type not in ("aquila", "baichuan")
    compared = (
        "verified: transformers' logits differ" if shipped else "not verified against other code: transformers has"
    )
    assert compared in outcomes[1].printed
    before, after = published.weights_of(folder), published.weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    check_carried(folder, tmp_path / "back")
    check_carried(folder, tmp_path / "run/hf")
    arch = HfFolder(folder).arch
    assert HfFolder(tmp_path / "back").arch == HfFolder(tmp_path / "run/hf").arch == arch
    begins = "note: this tokenizer begins a text with <s>; the documents are without it: --add-bos writes it"
    assert (begins in outcomes[0].printed) is bool(Tokenizer(folder).before_text)
    assert "sampling as generation_config.json says: temperature 0.3, top-p 1, top-k 50" in outcomes[4].printed
    assert "sampling" not in outcomes[6].printed
    if arch.family in ("llama", "mistral", "qwen2", "qwen3"):
        text = read_in_transformers(tmp_path / "run/hf")
        assert text in (None, outcomes[6].printed.removesuffix("\n"))


def check_carried(folder, out):
    """The tokenizer, its code and the model's, the ids and the generation settings are as they were."""
    given = json.loads((folder / "config.json").read_text())
    found = json.loads((out / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "auto_map", "model_type"):
        assert found.get(key) == given.get(key), key
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings == json.loads((folder / "generation_config.json").read_text())
    release = published.RELEASES[folder.name]
    carried = [name for name in release.files if name.startswith(("tokeniz", "special", "vocab", "merges", "modeling"))]
    carried += [name for name in release.files if name.startswith(("configuration", "generation_utils"))]
    for name in set(carried) - {"tokenizer.model.v3"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (out / "handler.py").exists()  # nothing imports it


def read_in_transformers(folder):
    """transformers' continuation of a prompt, where it reads the tokenizer too."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    if (folder / "tokenizer.json").is_file():
        words, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
        for text in published.LINES[:4]:
            assert words(text)["input_ids"] == ours.before_text + ours.encode_batch([text])[0]
        prompt = words("A tokenizer", return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
        return words.decode(out[0], skip_special_tokens=True)
    return None


@pytest.mark.parametrize("name", ["Baichuan-7B", "llama-7b-hf", "bare"])
def test_sentencepiece_itself_gives_the_same_ids(name, tmp_path):
    """`bare` is a Llama folder with tokenizer.model and no other file of a tokenizer."""
    folder = published.make("llama-7b-hf" if name == "bare" else name, tmp_path)
    if name == "bare":
        (folder / "tokenizer_config.json").unlink()
        (folder / "special_tokens_map.json").unlink()
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    words = Tokenizer(folder, special=False)
    assert words.encode_batch(TEXTS) == pieces.encode(TEXTS)
    for text, ids in zip(TEXTS, words.encode_batch(TEXTS), strict=True):
        assert words.decode(ids) == pieces.decode(ids) == text.replace("▁", " ")
        own, offsets = words.encode_with_offsets(text)
        assert own.tolist() == ids
        assert "".join(text[a:b] for a, b in dict.fromkeys(offsets)) == text
    assert (words.eod, words.vocab_size) == (2, published.PIECES)
    assert words.before_text == ([] if name == "Baichuan-7B" else [1])
    assert words.encode_whole(["a"])[0] == [*words.before_text, *pieces.encode("a")]
    assert special_ids(folder) == {"bos_token_id": 1, "eos_token_id": 2}
    as_tokens = Tokenizer(folder)
    assert as_tokens.encode_batch(["a</s>b"])[0] == [*pieces.encode("a"), 2, *pieces.encode("b")]
    assert as_tokens.decode(as_tokens.encode_batch(["a</s>b"])[0], special=True) == "a</s>b"


def test_tokens_that_were_added_later_are_tokens(tmp_path):
    """A Baichuan chat model with two tokens of its own, one special; and Llama's way to begin a part behind one (legacy)."""
    folder = published.make("Baichuan-7B", tmp_path)
    extra = {str(published.PIECES): {"content": "<|user|>", "special": True, "rstrip": True}}
    config = published.BAICHUAN_TOKENIZER | {"added_tokens_decoder": extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(
        json.dumps({"<|user|>": published.PIECES, "<tool>": published.PIECES + 1})
    )
    words, text = Tokenizer(folder), "<|user|>  hello<tool>"
    (ids,) = words.encode_batch([text])
    assert (ids[0], ids[-1]) == (published.PIECES, published.PIECES + 1)
    assert words.vocab_size == published.PIECES + 2
    assert words.decode(ids) == "hello<tool>"
    assert words.encode_with_offsets(text)[1][0] == (0, 10)
    assert "<|user|>" in words.special_texts
    assert "<tool>" not in words.special_texts
    assert Tokenizer(folder, special=False).encode_batch(["<|user|>"])[0][0] != published.PIECES
    assert words.decode_one(published.PIECES) == "<|user|>"
    llama = published.make("llama-7b-hf", tmp_path)
    for legacy, behind in ((True, "▁x"), (False, "x")):
        (llama / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, **published.NAMES}))
        words = Tokenizer(llama)
        (ids,) = words.encode_batch(["a</s>x e"])
        assert "".join(map(words.decode_one, ids)) == f"▁a</s>{behind}▁e"
        assert words.decode(ids, special=True) == "a</s>x e"


def test_a_damaged_model_is_one_line(tmp_path):
    folder = published.make("Baichuan-7B", tmp_path)
    whole = (folder / "tokenizer.model").read_bytes()
    for data in (b"\n\x03abc", whole[: len(whole) // 2], b""):
        (folder / "tokenizer.model").write_bytes(data)
        (outcomes,) = run_commands(
            [["data", "inspect", "x", "--tokenizer", str(folder)], commands(folder)[0]], tmp_path
        )
        assert outcomes[1].error.count("\n") == 0, outcomes[1].error
    shutil.rmtree(folder)
