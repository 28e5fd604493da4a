"""RoPE scaling of every family that transformers scales: read, computed and written as transformers does it."""

import json
import shutil
from typing import Any

import pytest
import torch
import transformers

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConversionError
from flagscale_like.families import FAMILIES, read_config
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.families import tiny
from tests.harness import run_ranks

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
SHORT = {"max_position_embeddings": 16}  # tiny.ids() are longer: dynamic scaling changes the base
VARIANTS = {
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "linear by 1": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 1.0}}),
    "llama3": ("qwen2", {"rope_parameters": tiny.LLAMA3}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, **SHORT}),
    "dynamic by 1": ("mistral", {"rope_parameters": {**DYNAMIC, "factor": 1.0}, **SHORT}),
    "dynamic, short": ("qwen3", {"rope_parameters": DYNAMIC}),
    "yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "yarn, all numbers": (
        "qwen3",
        {
            "rope_parameters": {
                **YARN,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            }
        },
    ),
    "yarn, attention factor": ("mistral", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "yarn, no original": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    "yarn, no factor": ("llama", {"rope_parameters": {**YARN, "factor": None}}),
}


def native_logits(folders, ids):
    """{name: logits [b, s, v]} of the native model."""
    found = {}
    with parallel_context(Parallel()) as ctx, torch.no_grad():
        for name, folder in folders.items():
            source = HfFolder(folder)
            model = Engine.build(ModelSpec(arch=source.arch, seq_length=ids.shape[1]), ctx, source=source).model.eval()
            found[name] = model(ids, None, None)[..., : tiny.SHAPE["vocab_size"]].numpy()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("scaled"), {}
    for name, (family, changes) in VARIANTS.items():
        class_name, shape = tiny.SHIPPED[family]
        key = f"scaled {name}"  # no name of tiny's own
        tiny.SHIPPED[key] = (class_name, shape | {"num_key_value_heads": 2, "sliding_window": None} | changes)
        try:
            made[name] = tiny.make(key, root)
        finally:
            del tiny.SHIPPED[key]
    return made


def test_logits_equal_transformers_in_and_out(folders, tmp_path):
    ids = tiny.ids()
    (ours,) = run_ranks(1, native_logits, folders, ids)
    plain = tiny.reference_logits(tiny.make("llama", tmp_path), ids)
    wrong = {}
    for name, folder in folders.items():
        theirs = tiny.reference_logits(folder, ids)
        family, arch = read_config(folder)
        again = tmp_path / name
        shutil.copytree(folder, again)
        (again / "config.json").write_text(json.dumps(family.hf_config(arch)))
        assert read_config(again) == (family, arch)
        largest = theirs.abs().max()
        in_ = ((torch.from_numpy(ours[name]) - theirs).abs().max() / largest).item()
        out = ((tiny.reference_logits(again, ids) - theirs).abs().max() / largest).item()
        if not (in_ < 1e-5 and out == 0):
            wrong[name] = (in_, out)
    assert not wrong
    assert not torch.equal(plain, tiny.reference_logits(folders["linear"], ids))  # or the comparison would say little


def continuation(folder, prompt, count):
    with parallel_context(Parallel()) as ctx:
        source = HfFolder(folder)
        own = OwnEngine(Engine.build(ModelSpec(arch=source.arch, seq_length=32), ctx, source=source))
        return next(own.generate([Prompt(prompt, 0)], Sampling(count, temperature=0))).ids


def test_generation_with_dynamic_scaling_is_that_of_transformers(folders):
    prompt, count = tiny.ids()[0, :12].tolist(), 18  # from 12 tokens to 30: the scaling starts at 17
    (ours,) = run_ranks(1, continuation, folders["dynamic"], prompt, count)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["dynamic"], dtype=torch.float32)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    assert ours == theirs[0, len(prompt) :].tolist()


SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "vocab_size": 100,
}


def scaled(kind, **numbers):
    return ModelArch(
        **SHAPE, max_position_embeddings=64, position={"scaling": {"kind": kind, "factor": 2.0, **numbers}}
    )


@pytest.mark.parametrize(
    ("family", "arch", "message"),
    [
        (
            "aquila",
            scaled("yarn", original_max_position_embeddings=32),
            "with yarn RoPE scaling cannot be written as aq",
        ),
        ("baichuan", scaled("linear"), "with linear RoPE scaling cannot be written as baichuan"),
        (
            "llama",
            scaled("dynamic", original_max_position_embeddings=32),
            r"dynamic from original_max_position_embeddings \(32\) on.*\(64\): set model.max_position_embeddings to 32",
        ),
    ],
)
def test_what_a_family_cannot_express_is_refused(family, arch, message):
    with pytest.raises(ConversionError, match=message):
        FAMILIES[family].hf_config(arch)


def test_the_longest_sequence_is_what_the_scaling_makes_of_the_positions():
    assert scaled("linear").longest_sequence == 128
    assert scaled("yarn", original_max_position_embeddings=48).longest_sequence == 96
    assert scaled("dynamic", original_max_position_embeddings=64).longest_sequence == 0
    assert scaled("llama3").longest_sequence == 64
    assert ModelArch(**SHAPE).longest_sequence == 0
