"""Formulas of ModelArch against models that megatron-core builds."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from flagscale_like.arch import ModelArch, Role, RopeScaling, parameters, parameters_by_name
from flagscale_like.config import Parallel, load_config
from flagscale_like.families import read_config
from flagscale_like.model.build import build_chunks, named_shards
from flagscale_like.model.experts import is_expert
from flagscale_like.model.initialise import initialize_weights
from flagscale_like.model.spec import ModelSpec
from flagscale_like.planner.published import MIXTRAL_8X7B, QWEN3_30B_A3B
from flagscale_like.runtime.parallel import parallel_context
from tests.families.test_config import PUBLISHED, write
from tests.harness import REPOSITORY, run_ranks, tiny_config

AQUILA2_70B = {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "ffn_hidden_size": 28672,
    "vocab_size": 100008,
}
BAICHUAN_7B: dict[str, Any] = {
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


def counts_of_experts(config) -> tuple[int, int]:
    """All parameters, and those of stacked experts, of a model on the meta device, counted by torch."""
    with parallel_context(config.parallel) as ctx:
        (model,) = build_chunks(ModelSpec.of(config), ctx, meta=True)
        stacked = sum(p.numel() for p in model.parameters() if is_expert(p))
        return sum(p.numel() for p in model.parameters()), stacked


def test_counts_of_mixtral_and_qwen3_are_the_built_models_and_the_published(tmp_path):
    """46.7 B, 12.9 B for each token; 30.5 B, 3.35 B, which its card rounds down."""
    for arch, total, active in ((MIXTRAL_8X7B, 46.7, 12.9), (QWEN3_30B_A3B, 30.5, 3.4)):
        config = tiny_config(tmp_path, model=arch.model_dump())
        ((built, stacked),) = run_ranks(1, counts_of_experts, config)
        count, experts = arch.parameter_count(), arch.experts
        padding = arch.parameter_count(arch.padded_vocab_size()) - count
        assert built == count + padding
        assert built - stacked + stacked * experts.top_k // experts.count == arch.active_parameter_count() + padding
        assert (round(count / 1e9, 1), round(arch.active_parameter_count() / 1e9, 1)) == (total, active)


def test_the_published_count_of_baichuan_7b_is_met():
    assert ModelArch(**BAICHUAN_7B).parameter_count() == 7_000_559_616


def test_tensor_parallel_ranks_share_the_matrices_and_repeat_the_norms(tmp_path):
    config = tiny_config(tmp_path, parallel__tp=2)
    arch, counts = config.model, run_ranks(2, count_built, config)
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    assert sum(counts) == arch.parameter_count(arch.padded_vocab_size(2)) + norms


EXAMPLES = sorted((REPOSITORY / "examples").rglob("*.yaml"))
LAYOUTS = {
    "one": (1, {}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
}


@pytest.fixture(scope="module")
def known_archs(tmp_path_factory):
    """Every published family and every example, with 4 layers."""
    folder = tmp_path_factory.mktemp("config")
    archs = [read_config(write(folder, values))[1] for values, *_ in PUBLISHED.values()]
    archs += [load_config(path).model for path in EXAMPLES if "model" in yaml.safe_load(path.read_text())]
    assert {arch.family for arch in archs} >= {"llama", "mistral", "qwen2", "qwen3", "baichuan", "baichuan2", "aquila"}
    return [arch.model_copy(update={"num_layers": 4}) for arch in archs]


def built_shapes(parallel, archs):
    """Per model: the names and shapes of this rank's parameters, as megatron-core builds them on the meta device."""
    with parallel_context(Parallel(**parallel)) as ctx:
        found = []
        for arch in archs:
            chunks = build_chunks(ModelSpec(arch=arch, parallel=ctx.layout), ctx, meta=True)
            named = [item for chunk in chunks for item in named_shards(chunk).items()]
            found.append([(name, tuple(parameter.shape)) for name, parameter in named])
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_lists_what_megatron_core_builds(layout, known_archs):
    ranks, parallel = LAYOUTS[layout]
    tp = parallel.get("tp", 1)
    archs = [arch for arch in known_archs if not (arch.num_attention_heads % tp or arch.num_query_groups % tp)]
    results = run_ranks(ranks, built_shapes, parallel, archs)
    assert len(archs) > 15
    for arch, *found in zip(archs, *results, strict=True):
        table = parameters_by_name(arch)
        for shapes in found:
            assert shapes == [(name, table[name].shard_shape(tp)) for name, _ in shapes]
        names = {name for shapes in found for name, _ in shapes}
        if arch.tie_embeddings:  # the last stage's copy
            names -= {"output_layer.weight"}
        assert names == {parameter.name for parameter in parameters(arch)}
        if layout == "one":
            assert [name for name, _ in found[0]] == [parameter.name for parameter in parameters(arch)]


def test_the_table_adds_up_to_the_parameter_count(known_archs):
    for arch in known_archs:
        assert sum(parameter.numel for parameter in parameters(arch)) == arch.parameter_count()
        padded = sum(math.prod(parameter.padded_shape(2)) for parameter in parameters(arch))
        assert padded == arch.parameter_count(arch.padded_vocab_size(2))


def drawn(configs, only):
    """Per configuration: this rank's parameters (filled with 7 and then drawn), and the dimension megatron-core cuts."""
    found = []
    for config in configs:
        with parallel_context(config.parallel) as ctx:
            chunks = build_chunks(ModelSpec.of(config), ctx)
            named = {name: p for chunk in chunks for name, p in named_shards(chunk).items()}
            with torch.no_grad():
                for parameter in named.values():
                    parameter.fill_(7.0)
            initialize_weights(chunks, ctx, only=only and {named[name] for name in only if name in named})
            found.append(
                {name: (p.detach().numpy().copy(), getattr(p, "partition_dim", -1)) for name, p in named.items()}
            )
    return found


def test_shards_are_cut_as_the_table_says(tmp_path):
    changes = {"model__qkv_bias": True, "model__qk_norm": True}
    whole, half = (tiny_config(tmp_path, parallel__tp=tp, **changes) for tp in (1, 2))
    ((full,),) = run_ranks(1, drawn, [whole], None)
    (first,), (second,) = run_ranks(2, drawn, [half], None)
    for parameter in parameters(whole.model):
        value, (a, cut), (b, _) = full[parameter.name][0], first[parameter.name], second[parameter.name]
        if parameter.cut is None:
            assert (a == b).all()
            continue
        if len(parameter.shape) > 1:
            assert cut == parameter.cut, parameter.name
        # Each rank of the model computes silu(gate) * up of its own rows: [its gate; its up].
        blocks = 2 if parameter.name.endswith("linear_fc1.weight") else 1
        parts = zip(*(np.split(shard, blocks, parameter.cut) for shard in (a, b)), strict=True)
        joined = np.concatenate([shard for pair in parts for shard in pair], axis=parameter.cut)
        rows = parameter.shape[0]
        assert (joined[:rows] == value[:rows]).all(), parameter.name
        assert not joined[rows:].any()


def test_only_the_named_parameters_are_drawn(tmp_path):
    tied = tiny_config(tmp_path, parallel__pp=2, model__tie_embeddings=True)
    names = {p.name for p in parameters(tied.model) if p.role in (Role.EMBEDDING, Role.FFN_OUT)}
    (first,), (last,) = run_ranks(2, drawn, [tied], names | {"output_layer.weight"})
    for name, (value, _) in [*first.items(), *last.items()]:
        assert bool((value == 7.0).all()) == (name not in names | {"output_layer.weight"}), name
    assert (first["embedding.word_embeddings.weight"][0] == last["output_layer.weight"][0]).all()


def test_flops_of_a_dense_transformer_are_six_a_parameter_and_token_and_attention_on_top():
    arch = ModelArch(**BAICHUAN_7B)
    matrices = arch.parameter_count(0) - (2 * arch.num_layers + 1) * arch.hidden_size
    logits = arch.hidden_size * arch.padded_vocab_size()
    attention = arch.flops_per_token(4096) - 6 * (matrices + logits)
    # 12 s h a layer: two products of 2 s h, forward once and backward twice
    assert attention == 12 * 4096 * arch.hidden_size * arch.num_layers


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_example_is_a_valid_configuration(path):
    # A run that starts from a Hugging Face folder reads the model there; any model stands in for it here.
    overrides = [] if "model" in yaml.safe_load(path.read_text()) else [f"model={BAICHUAN_7B}"]
    load_config(path, overrides)


def test_a_scaling_that_an_older_version_saved_is_read():
    """It saved the numbers of all kinds, which were those of linear and llama3."""
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for kind in ("linear", "llama3"):
        old = RopeScaling.model_validate({"kind": kind, "factor": 2.0, **numbers})
        assert old == RopeScaling(kind=kind, factor=2.0)
    for kind in ("dynamic", "yarn"):
        new = RopeScaling(kind=kind, factor=2.0, original_max_position_embeddings=64)
        assert RopeScaling.model_validate(new.model_dump(mode="json")) == new
