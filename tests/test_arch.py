"""Formulas of ModelArch against models that megatron-core builds."""

import pytest
import yaml

from flagscale_like.arch import ModelArch
from flagscale_like.config import load_config
from flagscale_like.model.build import build_chunks
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import REPOSITORY, run_ranks, tiny_config

AQUILA2_70B = {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "ffn_hidden_size": 28672,
    "vocab_size": 100008,
}
BAICHUAN_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "ffn_hidden_size": 11008,
    "vocab_size": 64000,
}


def count_built(config) -> int:
    """Parameters of this rank, built on the meta device; a tied copy on the last stage counts nothing."""
    with parallel_context(config.parallel) as ctx:
        chunks = build_chunks(ModelSpec.of(config), ctx, meta=True)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        assert all(p.is_meta for p in parameters)
        return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("model", [AQUILA2_70B, BAICHUAN_7B, {**BAICHUAN_7B, "tie_embeddings": True}])
def test_the_parameter_formula_equals_the_built_model(model, tmp_path):
    config = tiny_config(tmp_path, model=model)
    (built,) = run_ranks(1, count_built, config)
    assert built == config.model.parameter_count(config.model.padded_vocab_size())


def test_the_published_count_of_baichuan_7b_is_met():
    assert ModelArch(**BAICHUAN_7B).parameter_count() == 7_000_559_616


def test_tensor_parallel_ranks_share_the_matrices_and_repeat_the_norms(tmp_path):
    config = tiny_config(tmp_path, parallel__tp=2)
    arch, counts = config.model, run_ranks(2, count_built, config)
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    assert sum(counts) == arch.parameter_count(arch.padded_vocab_size(2)) + norms


def test_flops_of_a_dense_transformer_are_six_a_parameter_and_token_and_attention_on_top():
    arch = ModelArch(**BAICHUAN_7B)
    matrices = arch.parameter_count(0) - (2 * arch.num_layers + 1) * arch.hidden_size
    logits = arch.hidden_size * arch.padded_vocab_size()
    attention = arch.flops_per_token(4096) - 6 * (matrices + logits)
    # 12 s h a layer: two products of 2 s h, forward once and backward twice
    assert attention == 12 * 4096 * arch.hidden_size * arch.num_layers


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "examples").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_every_example_is_a_valid_configuration(path):
    # A run that starts from a Hugging Face folder reads the model there; any model stands in for it here.
    overrides = [] if "model" in yaml.safe_load(path.read_text()) else [f"model={BAICHUAN_7B}"]
    load_config(path, overrides)
