"""Folders of exactly the files that publishers put on the hub, with small weights and tokenizers of the same kinds.

The lists are data, as remembered from the model pages; of Aquila2, whose releases differ, both forms are here. `weights`
says how the weights are cut. Every Python file raises when it is executed.
"""

import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import LlamaTokenizer, Qwen2Tokenizer

from flagscale_like.data.tokenizer import train_bpe
from flagscale_like.families import find_family
from flagscale_like.families.settings import Settings

PIECES = 330
LINES = [
    "A tokenizer folder as it was published.",
    "你好，世界。天地玄黄，宇宙洪荒。",
    "x = 12345 + 678",
    "hello  two  spaces",
] * 8
CODE = 'raise RuntimeError("code of the folder was executed")\n'
DOCUMENTS = (".gitattributes", "README.md")
SHAPE = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": PIECES,
}


@dataclass(frozen=True)
class Published:
    """One release.

    Attributes:
        files: beside the documents and the weights.
        weights: names of the files with weights; `{n}` counts them.
        shards: how many there are.
        config: config.json beside the shape.
        tokenizer: tokenizer_config.json.
    """

    files: tuple[str, ...]
    weights: tuple[str, ...]
    config: dict
    tokenizer: dict
    shards: int = 1
    special: dict = field(default_factory=dict)


def added(text):
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    return {"__type": "AddedToken", "content": text, **flags}


BAICHUAN_CODE = ("configuration_baichuan.py", "modeling_baichuan.py", "tokenization_baichuan.py")
SENTENCE_PIECE = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.model")
BAICHUAN_TOKENIZER = {
    "add_bos_token": False,
    "add_eos_token": False,
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "bos_token": added("<s>"),
    "clean_up_tokenization_spaces": False,
    "eos_token": added("</s>"),
    "model_max_length": 4096,
    "sp_model_kwargs": {},
    "tokenizer_class": "BaichuanTokenizer",
    "unk_token": added("<unk>"),
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_TOKENIZER = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer", **NAMES}


def baichuan(class_name, **more):
    module = "modeling_baichuan." + class_name
    code = {"AutoConfig": "configuration_baichuan.BaichuanConfig", "AutoModelForCausalLM": module}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"architectures": [class_name], "auto_map": code, "model_type": "baichuan", **ids, **more}


BINS, BIN = ("pytorch_model-{n:05d}-of-{of:05d}.bin", "pytorch_model.bin.index.json"), ("pytorch_model.bin",)
SAFE = ("model-{n:05d}-of-{of:05d}.safetensors", "model.safetensors.index.json")
GPT2_FILES = ("config.json", "generation_config.json", "merges.txt", "tokenizer_config.json", "vocab.json")
END = "<|endoftext|>"
GQA = {"num_key_value_heads": 2, "max_position_embeddings": 2048, "rope_theta": 10000.0}
AQUILA = {
    "architectures": ["AquilaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_aquila.AquilaConfig",
        "AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 0,
    "model_type": "aquila",
    **GQA,
}
AQUILA_CODE = ("configuration_aquila.py", "modeling_aquila.py", "special_tokens_map.json")
GPT2 = {
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": END,
    "eos_token": END,
    "unk_token": END,
    "add_prefix_space": False,
}
QWEN = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": END,
    "pad_token": END,
    "bos_token": None,
    "add_bos_token": False,
}

RELEASES = {
    "Baichuan-7B": Published(
        (*SENTENCE_PIECE, "tokenizer_config.json", *BAICHUAN_CODE, "handler.py"),
        BIN,
        baichuan("BaiChuanForCausalLM", max_position_embeddings=4096),
        BAICHUAN_TOKENIZER,
    ),
    "Baichuan-13B-Base": Published(
        (*SENTENCE_PIECE, "tokenizer_config.json", *BAICHUAN_CODE),
        BINS,
        baichuan("BaichuanForCausalLM", model_max_length=4096, vocab_size=64_000, hidden_size=16),
        BAICHUAN_TOKENIZER,
        shards=3,
    ),
    "Baichuan2-7B-Base": Published(
        (*SENTENCE_PIECE, "tokenizer_config.json", *BAICHUAN_CODE, "generation_utils.py", "quantizer.py"),
        BIN,
        baichuan("BaichuanForCausalLM", max_position_embeddings=4096, model_max_length=4096, z_loss_weight=0),
        BAICHUAN_TOKENIZER,
    ),
    "Baichuan2-13B-Base": Published(
        (*SENTENCE_PIECE, "tokenizer_config.json", *BAICHUAN_CODE, "generation_utils.py", "quantizer.py"),
        BINS,
        baichuan("BaichuanForCausalLM", model_max_length=4096, z_loss_weight=0),
        BAICHUAN_TOKENIZER,
        shards=3,
    ),
    "Aquila2-7B": Published((*GPT2_FILES, *AQUILA_CODE), BINS, AQUILA, GPT2, shards=3),
    "Aquila2-34B": Published((*GPT2_FILES, *AQUILA_CODE, "tokenizer.json"), SAFE, AQUILA, GPT2, shards=2),
    # The first conversion of Llama: a class that transformers then renamed, and a tokenizer that names nothing.
    "llama-7b-hf": Published(
        (*SENTENCE_PIECE, "tokenizer_config.json"),
        BINS,
        {
            "architectures": ["LLaMAForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "max_sequence_length": 2048,
            "model_type": "llama",
            "pad_token_id": -1,
        },
        {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"},
        shards=4,
    ),
    "Llama-2-7b-hf": Published(
        (*SENTENCE_PIECE, "tokenizer_config.json", "tokenizer.json", "LICENSE.txt", "USE_POLICY.md"),
        (*SAFE, *BINS),
        {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "model_type": "llama", **GQA},
        LLAMA_TOKENIZER | {"legacy": False},
        shards=2,
        special=NAMES,
    ),
    "Llama-3.2-1B": Published(
        (
            *("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json"),
            *(
                "tokenizer_config.json",
                "LICENSE.txt",
                "USE_POLICY.md",
                "original/params.json",
                "original/tokenizer.model",
            ),
        ),
        ("model.safetensors", "original/consolidated.00.pth"),
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": True,
            **GQA,
        },
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END},
    ),
    "Mistral-7B-v0.3": Published(
        (*SENTENCE_PIECE, "tokenizer_config.json", "tokenizer.json", "tokenizer.model.v3", "params.json"),
        (*SAFE, "consolidated.safetensors"),
        {
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "model_type": "mistral",
            "sliding_window": None,
            **GQA,
        },
        LLAMA_TOKENIZER | {"legacy": False},
        shards=3,
        special=NAMES,
    ),
    "Qwen2.5-0.5B": Published(
        (*GPT2_FILES, "tokenizer.json", "LICENSE"),
        ("model.safetensors",),
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 0, **GQA},
        QWEN,
    ),
    "Qwen3-8B": Published(
        (*GPT2_FILES, "tokenizer.json", "LICENSE"),
        SAFE,
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "eos_token_id": 0, "head_dim": 16, **GQA},
        QWEN,
        shards=5,
    ),
}


def make(name: str, parent: Path) -> Path:
    """Write a release under `parent`; returns its folder."""
    release, folder = RELEASES[name], parent / name
    folder.mkdir()
    if any(file.startswith("original/") for file in release.files):
        (folder / "original").mkdir()
    for file in (*release.files, *DOCUMENTS):
        (folder / file).write_text(CODE if file.endswith(".py") else f"{file} of {name}\n")
    if "modeling_baichuan.py" in release.files:
        _imports(folder)
    config = {**SHAPE, **release.config}
    (folder / "config.json").write_text(json.dumps(config))
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    (folder / "generation_config.json").write_text(json.dumps({**ids, "temperature": 0.3, "do_sample": True}))
    make_tokenizer(folder, release)
    _write_weights(folder, release, _weights(config))
    return folder


def _imports(folder: Path) -> None:
    """As modeling_baichuan.py takes its neighbours in: only from what is there."""
    neighbours = [
        path.stem for path in folder.glob("*.py") if path.stem in ("configuration_baichuan", "generation_utils")
    ]
    lines = [f"from .{neighbour} import something" for neighbour in neighbours]
    (folder / "modeling_baichuan.py").write_text("\n".join([*lines, CODE]))


def make_tokenizer(folder: Path, release: Published) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(release.tokenizer))
    if "special_tokens_map.json" in release.files:
        (folder / "special_tokens_map.json").write_text(json.dumps(release.special))
    if "tokenizer.model" in release.files:
        train_pieces(folder / "tokenizer.model", prefix="Baichuan" not in folder.name)
        if "tokenizer.json" in release.files:
            (folder / "tokenizer.json").unlink()
            LlamaTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    else:
        words = train_bpe(LINES, 300, folder / "made").folder
        made = json.loads((words / "tokenizer.json").read_text())
        if "tokenizer.json" in release.files:
            if release.tokenizer["tokenizer_class"] == "Qwen2Tokenizer":  # splits text by an expression of its own
                own = Qwen2Tokenizer(vocab=made["model"]["vocab"], merges=[tuple(m) for m in made["model"]["merges"]])
                made = json.loads(own.backend_tokenizer.to_str())
            (folder / "tokenizer.json").write_text(json.dumps(made))
        if "vocab.json" in release.files:
            (folder / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
            (folder / "merges.txt").write_text(
                "#version: 0.2\n" + "\n".join(" ".join(m) for m in made["model"]["merges"])
            )
        for path in words.iterdir():
            path.unlink()
        words.rmdir()


def train_pieces(path: Path, *, prefix: bool) -> None:
    """A SentencePiece BPE with byte fallback, as Llama's, with a space before a text (`prefix`), or Baichuan's."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def _weights(config: dict) -> dict[str, torch.Tensor]:
    settings = Settings(config, "config.json")
    kinds = {"baichuan": "baichuan2" if "z_loss_weight" in config else "baichuan"}
    family = find_family(kinds.get(config["model_type"], config["model_type"]))
    arch, generator = family.read(settings), torch.Generator().manual_seed(0)
    found = {}
    for rule in family.rules(arch):
        for name, shape in zip(rule.hf, rule.hf_shapes(arch), strict=True):
            noise = torch.randn(shape, generator=generator)
            found[name] = (1 + 0.1 * noise if len(shape) == 1 else 0.1 * noise).to(torch.bfloat16)
    return found


def _write_weights(folder: Path, release: Published, tensors: dict[str, torch.Tensor]) -> None:
    if any(name.endswith(".bin") for name in release.weights):
        # What is no weight lies in pickles of that time.
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    names, of = list(tensors), release.shards
    for pattern in release.weights:
        if pattern.endswith(".index.json"):
            continue
        shards = of if "{n" in pattern else 1
        files = [pattern.format(n=n + 1, of=of) for n in range(shards)]
        weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
        for file in files:
            held = {name: tensors[name].clone() for name in names if weight_map[name] == file}
            if file.endswith(".safetensors"):
                save_file(held, folder / file, metadata={"format": "pt"})
            else:
                torch.save(held, folder / file)
        index = {".bin": "pytorch_model.bin.index.json", ".safetensors": "model.safetensors.index.json"}.get(
            Path(pattern).suffix
        )
        if index in release.weights and shards > 1:
            (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.bin")) or sorted(folder.glob("model*.safetensors")):
        found |= torch.load(path) if path.suffix == ".bin" else load_file(path)
    return {name: tensor for name, tensor in found.items() if not re.search("inv_freq", name)}
