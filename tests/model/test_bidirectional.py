"""Attention in both directions: vectors of texts are transformers' on every layout; what it is not defined for is refused."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from flagscale_like.arch import ModelArch
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.data.batch import Batch
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError, ConversionError
from flagscale_like.families import FAMILIES
from flagscale_like.model.spec import ModelSpec
from flagscale_like.objectives.embedding import TextVectors
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.weights import check_model
from tests.families import tiny
from tests.harness import run_ranks, tiny_config

LENGTHS = (3, 7, 4, 9)  # in two rows of 16: the first has 6 places of padding, the second 3
NAMES = ("llama", "qwen2", "qwen3")
LAYOUTS = {
    1: [{}],
    2: [{"tp": 2, "sp": True}, {"pp": 2}, {"cp": 2, "cp_kind": "a2a"}],
}


def texts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 130, (length,), generator=generator) for length in LENGTHS]


def batch():
    rows, bounds = torch.zeros(2, 16, dtype=torch.int64), []
    for number, text in enumerate(texts()):
        row, first = divmod(number, 2)
        start = LENGTHS[2 * row] * first
        rows[row, start : start + len(text)] = text
        bounds.append(16 * row + start)
    documents = torch.tensor([*bounds, 32], dtype=torch.int32)
    return Batch(tokens=rows, labels=rows, loss_mask=rows.float(), documents=documents, lengths=torch.tensor(LENGTHS))


def vectors(folders, layouts, pooling):
    found = []
    for parallel in layouts:
        with parallel_context(Parallel(**parallel)) as ctx:
            for folder in folders:
                source = HfFolder(folder)
                sizes: dict[str, Any] = {"seq_length": 16, "micro_batch_size": 2}
                spec = ModelSpec(arch=source.arch, head="hidden", parallel=ctx.layout, **sizes)
                engine = Engine.build(spec, ctx, source=source)
                with engine.evaluation():
                    own = engine.vectors(iter([batch(), batch()]), TextVectors(pooling), 2)
                assert (own is None) == (not ctx.is_last_stage)
                assert source.arch.tie_embeddings or "no output layer" in " ".join(engine.left)
                found.append(own if own is None else own.tolist())
    return found


def transformers_vectors(folder, pooling):
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    pick = {"last": lambda x: x[-1], "first": lambda x: x[0], "mean": lambda x: x.mean(0)}[pooling]
    with torch.no_grad():
        each = [pick(model(text[None]).last_hidden_state[0]) for text in texts()]
    return F.normalize(torch.stack(each), dim=-1)


@pytest.mark.parametrize(
    ("attention", "pooling"), [("bidirectional", "mean"), ("bidirectional", "first"), ("causal", "last")]
)
def test_vectors_of_packed_texts_are_those_of_transformers_on_every_layout(attention, pooling, tmp_path):
    folders = [tiny.make(name, tmp_path) for name in NAMES]
    for folder in folders:
        path = folder / "config.json"
        both = {"is_causal": False} if attention == "bidirectional" else {}
        path.write_text(json.dumps(json.loads(path.read_text()) | both))
    expected = [transformers_vectors(folder, pooling) for folder in folders]
    for ranks, layouts in LAYOUTS.items():
        for found in run_ranks(ranks, vectors, folders, layouts, pooling):
            for own, wanted in zip(found, expected * len(layouts), strict=True):
                if own is not None:
                    torch.testing.assert_close(torch.tensor(own), torch.cat((wanted, wanted)), rtol=1e-5, atol=1e-5)


def attend(config, slopes):
    """Core attention of one row of 5 tokens with ALiBi, and the same by its formula."""
    from flagscale_like.model.build import build_chunks

    with parallel_context(config.parallel) as ctx:
        spec = dataclasses.replace(ModelSpec.of(tiny_config("run")), arch=config.model, head="hidden")
        (model,) = build_chunks(spec, ctx)
        core, generator = model.decoder.layers[0].self_attention.core_attention, torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(5, 1, heads, 16, generator=generator) for heads in (4, 2, 2))
        found = core(q, k, v)[:, 0].view(5, 4, 16)
        k, v = (x[:, 0].repeat_interleave(2, dim=1) for x in (k, v))
        distance = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs()
        scores = torch.einsum("snd,tnd->nst", q[:, 0], k) / 4 - core.slopes[:, None, None] * distance
        return found.tolist(), torch.einsum("nst,tnd->snd", scores.softmax(-1), v).tolist()


def test_alibi_biases_both_directions_by_the_distance(tmp_path):
    arch = {"attention": "bidirectional", "position": {"kind": "alibi"}}
    config = tiny_config(tmp_path, model__position={"kind": "alibi"})
    config = config.model_copy(update={"model": ModelArch.model_validate(config.model.model_dump() | arch)})
    ((found, expected),) = run_ranks(1, attend, config, None)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__sliding_window": 4}, r"sliding_window \(4\) is defined for attention causal"),
        ({"model__position": {"kind": "nlpe", "threshold": 4}}, "position.kind nlpe is defined for attention causal"),
        (
            {"parallel": {"cp": 2}},
            r"parallel.cp \(2\) with cp_kind gather computes causal attention.* use cp_kind a2a, or cp 1",
        ),
        ({}, "model.attention bidirectional lets a token see those after it, which objective.kind next_token asks for"),
    ],
)
def test_what_attention_in_both_directions_is_not_defined_for_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, model__attention="bidirectional", **changes)


def test_a_language_model_is_causal(tmp_path):
    arch = ModelArch.model_validate(tiny_config(tmp_path).model.model_dump() | {"attention": "bidirectional"})
    with pytest.raises(ConfigError, match="makes vectors of texts, and predicts no token and no reward"):
        ModelSpec(arch=arch)
    ModelSpec(arch=arch, head="hidden")


def test_flops_halve_only_where_attention_is_causal(tmp_path):
    causal = tiny_config(tmp_path).model
    both = causal.model_copy(update={"attention": "bidirectional"})
    full = causal.flops_per_token(64)
    assert both.flops_per_token(64, causal=True) == both.flops_per_token(64) == full
    assert causal.flops_per_token(64, causal=True) < full
    assert full - causal.flops_per_token(64, output_layer=False) == 6 * 64 * causal.padded_vocab_size()


def test_a_family_of_transformers_writes_it_and_others_refuse_it(tmp_path):
    arch = tiny_config(tmp_path).model
    both = arch.model_copy(update={"attention": "bidirectional"})
    assert "is_causal" not in FAMILIES["llama"].hf_config(arch)
    assert FAMILIES["llama"].hf_config(both)["is_causal"] is False
    with pytest.raises(ConversionError, match="a model with bidirectional attention cannot be written as aquila"):
        FAMILIES["aquila"].hf_config(both)


def test_a_new_run_may_make_causal_weights_look_in_both_directions_and_says_so(tmp_path):
    config = tiny_config(tmp_path)
    source: Any = SimpleNamespace(folder="causal-model", arch=config.model)  # all that is read of it
    config = config.model_copy(update={"model": source.arch.model_copy(update={"attention": "bidirectional"})})
    (note,) = check_model(config, source, resuming=False)
    assert note == "model.attention is 'bidirectional' from here on; the weights were trained with 'causal'"
    with pytest.raises(Exception, match=r"model.attention: 'causal' saved, 'bidirectional' configured"):
        check_model(config, source, resuming=True)
