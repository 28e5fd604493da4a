"""config.json <-> ModelArch: published models read right, and what we cannot compute is refused by name and value."""

import json
from typing import Any

import pytest

from flagscale_like.arch import ModelArch
from flagscale_like.config import Parallel
from flagscale_like.errors import ConversionError
from flagscale_like.families import FAMILIES, read_config
from flagscale_like.families.features import features
from flagscale_like.families.settings import Settings
from flagscale_like.model.build import build_chunks
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import run_ranks

OLD = {"hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.31.0"}


def config(model_type, architecture, layers, hidden, heads, groups, ffn, vocab, **more):
    values = {
        "model_type": model_type,
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **OLD,
        **more,
    }
    return {key: value for key, value in values.items() if value is not None}


LENGTH = {"max_position_embeddings": 4096}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
BAICHUAN = ("baichuan", "BaichuanForCausalLM")
DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_scaling": DEEPSEEK_YARN,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "moe_layer_freq": 1,
    "ep_size": 1,
}
V2 = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2}

# Published models: config.json as their folders have it, family, parameters, what they use.
PUBLISHED = {
    "Llama-2-7B": (
        config("llama", "LlamaForCausalLM", 32, 4096, 32, 32, 11008, 32000, **LENGTH),
        "llama",
        6_738_415_616,
        {"rope"},
    ),
    "Llama-3.1-8B": (
        config("llama", "LlamaForCausalLM", 32, 4096, 32, 8, 14336, 128256, **LENGTH, **LLAMA3),
        "llama",
        8_030_261_248,
        {"rope", "query_groups", "llama3 RoPE scaling"},
    ),
    "SmolLM2-135M": (
        config("llama", "LlamaForCausalLM", 30, 576, 9, 3, 1536, 49152, **LENGTH, tie_word_embeddings=True),
        "llama",
        134_515_008,
        {"rope", "query_groups", "tie_embeddings"},
    ),
    "Mistral-7B-v0.1": (
        config("mistral", "MistralForCausalLM", 32, 4096, 32, 8, 14336, 32000, **LENGTH, sliding_window=4096),
        "mistral",
        7_241_732_096,
        {"rope", "query_groups", "sliding_window"},
    ),
    "Aquila2-7B": (
        config("aquila", "AquilaForCausalLM", 32, 4096, 32, None, 11008, 100008, max_position_embeddings=2048),
        "aquila",
        7_295_537_152,
        {"rope"},
    ),
    "Aquila2-34B": (
        config("aquila", "AquilaForCausalLM", 60, 6144, 48, 8, 24576, 100008, **LENGTH),
        "aquila",
        33_693_554_688,
        {"rope", "query_groups"},
    ),
    "Aquila2-70B": (
        config("aquila", "AquilaModel", 80, 8192, 64, 8, 28672, 100008, **LENGTH),
        "aquila",
        70_090_891_264,
        {"rope", "query_groups"},
    ),
    "Baichuan-7B": (
        config("baichuan", "BaiChuanForCausalLM", 32, 4096, 32, None, 11008, 64000, **LENGTH),
        "baichuan",
        7_000_559_616,
        {"rope"},
    ),
    "Baichuan-13B": (
        config(*BAICHUAN, 40, 5120, 40, None, 13696, 64000, model_max_length=4096),
        "baichuan",
        13_264_901_120,
        {"alibi"},
    ),
    "Baichuan2-7B": (
        config(*BAICHUAN, 32, 4096, 32, None, 11008, 125696, **LENGTH, model_max_length=4096),
        "baichuan2",
        7_505_973_248,
        {"rope", "norm_head"},
    ),
    "Baichuan2-13B": (
        config(*BAICHUAN, 40, 5120, 40, None, 13696, 125696, model_max_length=4096),
        "baichuan2",
        13_896_668_160,
        {"alibi", "norm_head"},
    ),
    "Qwen2-0.5B": (
        config("qwen2", "Qwen2ForCausalLM", 24, 896, 14, 2, 4864, 151936, **LENGTH, tie_word_embeddings=True),
        "qwen2",
        494_032_768,
        {"rope", "query_groups", "qkv_bias", "tie_embeddings"},
    ),
    "Qwen3-8B": (
        config("qwen3", "Qwen3ForCausalLM", 36, 4096, 32, 8, 12288, 151936, **LENGTH, head_dim=128),
        "qwen3",
        8_190_735_360,
        {"rope", "query_groups", "qk_norm"},
    ),
    "Mixtral-8x7B": (
        config(
            *("mixtral", "MixtralForCausalLM", 32, 4096, 32, 8, 14336, 32000),
            **{"max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None},
            **{"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
        ),
        "mixtral",
        46_702_792_704,
        {"rope", "query_groups", "experts"},
    ),
    "Qwen1.5-MoE-A2.7B": (
        config(
            *("qwen2_moe", "Qwen2MoeForCausalLM", 24, 2048, 16, 16, 5632, 151936),
            **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60},
            **{"num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, **LENGTH},
            **{"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21},
        ),
        "qwen2_moe",
        14_315_784_192,
        {"rope", "qkv_bias", "experts", "shared experts", "a gate of the shared experts"},
    ),
    "Qwen3-30B-A3B": (
        config(
            *("qwen3_moe", "Qwen3MoeForCausalLM", 48, 2048, 32, 4, 6144, 151936),
            **{"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128},
            **{"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], **LENGTH},
        ),
        "qwen3_moe",
        30_532_122_624,
        {"rope", "query_groups", "qk_norm", "experts"},
    ),
    "Qwen3-235B-A22B": (
        config(
            *("qwen3_moe", "Qwen3MoeForCausalLM", 94, 4096, 64, 4, 12288, 151936),
            **{"moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128},
            **{"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], **LENGTH},
        ),
        "qwen3_moe",
        235_093_634_560,
        {"rope", "query_groups", "qk_norm", "experts"},
    ),
    "OLMoE-1B-7B": (
        config(
            *("olmoe", "OlmoeForCausalLM", 16, 2048, 16, 16, 1024, 50304),
            **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, **LENGTH},
        ),
        "olmoe",
        6_919_161_856,
        {"rope", "qk_norm over the projection", "experts"},
    ),
    "DeepSeek-V2-Lite": (
        config(
            *("deepseek_v2", "DeepseekV2ForCausalLM", 27, 2048, 16, 16, 10944, 102400),
            **{**DEEPSEEK, **V2, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        )
        | {"q_lora_rank": None},
        "deepseek_v2",
        15_706_484_224,
        {"rope", "yarn RoPE scaling", "latent_attention", "experts", "shared experts", "dense layers"},
    ),
    "DeepSeek-V2": (
        config(
            *("deepseek_v2", "DeepseekV2ForCausalLM", 60, 5120, 128, 128, 12288, 102400),
            **{**DEEPSEEK, **V2, "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_experts_per_tok": 6},
            **{"n_group": 8, "topk_group": 3, "first_k_dense_replace": 1, "q_lora_rank": 1536},
            **{"routed_scaling_factor": 16.0},
        )
        | {"topk_method": "group_limited_greedy"},
        "deepseek_v2",
        235_741_434_880,
        {"rope", "yarn RoPE scaling", "latent_attention", "experts", "shared experts", "dense layers"}
        | {"groups of experts", "scaled weights of experts"},
    ),
    "DeepSeek-V3": (
        config(
            *("deepseek_v3", "DeepseekV3ForCausalLM", 61, 7168, 128, 128, 18432, 129280),
            **{**DEEPSEEK, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8},
            **{"n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536, "n_shared_experts": 1},
            **{"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
            **{"routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1},
        ),
        "deepseek_v3",
        671_026_419_200,
        {"rope", "yarn RoPE scaling", "latent_attention", "experts", "shared experts", "dense layers"}
        | {"groups of experts", "scaled weights of experts", "sigmoid scores", "a bias of the router"},
    ),
}
# Parameters that a token meets, in billions, as published.
ACTIVE = {
    "Mixtral-8x7B": 12.9,
    "Qwen1.5-MoE-A2.7B": 2.7,
    "Qwen3-30B-A3B": 3.3,
    "Qwen3-235B-A22B": 22,
    "OLMoE-1B-7B": 1.3,
    "DeepSeek-V2": 21,
    "DeepSeek-V3": 37,
}


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_parameter_count(name, tmp_path):
    values, family, parameters, used = PUBLISHED[name]
    found, arch = read_config(write(tmp_path, values))
    assert (found.name, features(arch)) == (family, used)
    assert arch.parameter_count() == parameters


@pytest.mark.parametrize("name", ACTIVE)
def test_a_published_mixture_of_experts_has_the_published_active_parameters(name, tmp_path):
    _, arch = read_config(write(tmp_path, PUBLISHED[name][0]))
    assert arch.active_parameter_count() / 1e9 == pytest.approx(ACTIVE[name], rel=0.03)


def count_built(archs):
    """Elements of each model as megatron-core builds it, on the meta device."""
    with parallel_context(Parallel()) as ctx:
        built = []
        for arch in archs:
            (chunk,) = build_chunks(ModelSpec(arch=arch, seq_length=16), ctx, meta=True)
            built.append(sum(p.numel() for p in chunk.parameters()))
        return built


def test_the_built_models_have_the_planned_parameter_counts(tmp_path):
    archs = [read_config(write(tmp_path, values))[1] for values, *_ in PUBLISHED.values()]
    (built,) = run_ranks(1, count_built, archs)
    assert built == [arch.parameter_count(arch.padded_vocab_size()) for arch in archs]
    # 64,000 and 125,696 are multiples of 128: here nothing is padded, and the count is the published one.
    by_name = dict(zip(PUBLISHED, built, strict=True))
    assert by_name["Baichuan-7B"] == 7_000_559_616
    assert by_name["Baichuan-13B"] == 13_264_901_120


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_written_from_what_was_read_reads_the_same(name, tmp_path):
    family, arch = read_config(write(tmp_path, PUBLISHED[name][0]))
    assert read_config(write(tmp_path, family.hf_config(arch))) == (family, arch)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Llama-2-7B", {"model_type": "gpt2"}, "model_type 'gpt2' is not known; known: aquila, baichuan, deep"),
        ("Llama-2-7B", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ("Llama-2-7B", {"hidden_size": None}, "has no hidden_size"),
        ("Llama-2-7B", {"num_hidden_layers": -1}, "num_hidden_layers is -1, must be a positive integer"),
        ("Llama-2-7B", {"vocab_size": "32000"}, "vocab_size is '32000'"),
        (
            "Llama-2-7B",
            {"num_key_value_heads": 7},
            r"num_attention_heads \(32\) must be divisible by num_query_groups \(7\)",
        ),
        ("Llama-2-7B", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu', 'swish'"),
        ("Llama-2-7B", {"attention_bias": True}, "attention_bias is True, supported: False"),
        (
            "Llama-2-7B",
            {"rope_scaling": {"type": "longrope"}},
            "rope_scaling is 'longrope', supported: linear, dynamic",
        ),
        ("Llama-2-7B", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling of type dynamic has no factor"),
        (
            "Llama-2-7B",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}},
            r"original_max_position_embeddings 2048, for which transformers takes max_position_embeddings \(4096\)",
        ),
        (
            "Llama-2-7B",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0}},
            r"rope_scaling: beta_fast \(1.0\) must be at least beta_slow \(2.0\)",
        ),
        (
            "Llama-3.1-8B",
            {"rope_scaling": {**LLAMA3["rope_scaling"], "low_freq_factor": 4.0}},
            r"rope_scaling: low_freq_factor \(4.0\) must be less than high_freq_factor \(4.0\)",
        ),
        (
            "Llama-3.1-8B",
            {"rope_scaling": {**LLAMA3["rope_scaling"], "original_max_position_embeddings": 0}},
            "rope_scaling: original_max_position_embeddings: Input should be greater than 0",
        ),
        (
            "Baichuan-7B",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is 'linear', which the published code of baichuan has not",
        ),
        ("Llama-2-7B", {"rope_theta": 1}, "rope_theta: base: Input should be greater than 1"),
        ("Llama-2-7B", {"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear has no factor"),
        ("Llama-2-7B", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling: factor"),
        ("Llama-2-7B", {"rope_scaling": "dynamic"}, "rope_scaling is 'dynamic', supported: one set of numbers"),
        (
            "Llama-2-7B",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters is .*supported: one set of numbers for all layers",
        ),
        ("Llama-2-7B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, supported: 1.0"),
        ("Llama-2-7B", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ("Baichuan-13B", {"model_max_length": None}, "has no model_max_length"),
        ("Mixtral-8x7B", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1, supported: 0"),
        ("Mixtral-8x7B", {"num_experts_per_tok": 9}, r"experts.top_k \(9\) must be at most experts.count \(8\)"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": ["x"]}, "mlp_only_layers is .* must be a list of layers"),
        ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', supported: 'greedy'"),
        ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob is True, supported: False"),
        ("DeepSeek-V3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, supported: 1e-06, which transformers gives"),
        ("DeepSeek-V3", {"num_key_value_heads": 8}, r"num_key_value_heads is 8, must be num_attention_heads \(128\)"),
        ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave is False, supported: True"),
        ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is of 'fp8'"),
        (
            "DeepSeek-V3",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
            "rope_scaling of type 'linear' has mscale_all_dim, supported: with type yarn",
        ),
        ("Baichuan-13B", {"position_embedding": "learned"}, "position_embedding is 'learned'"),
        (
            "Qwen2-0.5B",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20},
            "4 of 24 layers have a sliding window",
        ),
    ],
)
def test_what_we_cannot_compute_is_refused_with_its_name_and_value(name, change, message, tmp_path):
    values = {key: value for key, value in {**PUBLISHED[name][0], **change}.items() if value is not None}
    with pytest.raises(ConversionError, match=message):
        read_config(write(tmp_path, values))


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_model_is_not_written_as_a_family_that_cannot_compute_it():
    shape: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "vocab_size": 100,
    }
    for change, wrong in (
        ({"qkv_bias": True}, "qkv_bias"),
        ({"position": {"kind": "alibi"}}, "alibi"),
        ({"sliding_window": 4}, "sliding_window"),
    ):
        with pytest.raises(ConversionError, match=f"with {wrong} cannot be written as llama"):
            FAMILIES["llama"].hf_config(ModelArch(**shape, **change))
    with pytest.raises(ConversionError, match="without qkv_bias cannot be written as qwen2"):
        FAMILIES["qwen2"].hf_config(ModelArch(**shape))


def test_an_explicit_norm_head_decides_where_the_vocabulary_does_not():
    values = {**PUBLISHED["Baichuan-7B"][0], "norm_head": True}
    assert FAMILIES["baichuan2"].matches(Settings(values, "x"))
    assert not FAMILIES["baichuan"].matches(Settings(values, "x"))
