"""The planner's activation bytes against what saved_tensors_hooks hold in a real step, on every pipeline stage."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import torch

from flagscale_kernels.linear_cross_entropy import default_chunk_tokens, fused_linear_cross_entropy
from flagscale_like.arch import ModelArch
from flagscale_like.config import Kernels, RunConfig
from flagscale_like.engine.engine import Engine
from flagscale_like.model.offload import return_weight_gradients
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.memory import saved_activation_bytes
from flagscale_like.planner.saved import (
    FUSED,
    FUSED_ON_GPU,
    Operators,
    head_saves,
    layer_bytes,
    layer_saves,
    logits_for_a_moment,
    operators_of,
)
from flagscale_like.runtime.parallel import parallel_context
from tests.harness import build_engine, run_ranks, tiny_config, train_steps

LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp4": (4, {"pp": 4}),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
}
LAYOUTS_OF_SHARED_GROUPS = {"tp4 sp": (4, {"tp": 4, "sp": True})}


class Held:
    """A saved tensor; its storage counts for as long as any Held of it lives."""

    def __init__(self, tensor: torch.Tensor, meter: "Meter") -> None:
        self.tensor, self.meter = tensor, meter
        self.key, self.nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        meter.users[self.key] = meter.users.get(self.key, 0) + 1
        if meter.users[self.key] == 1:
            meter.now += self.nbytes
            meter.peak = max(meter.peak, meter.now)

    def __del__(self) -> None:
        self.meter.users[self.key] -= 1
        if not self.meter.users[self.key]:
            self.meter.now -= self.nbytes


class Meter:
    """Peak bytes of the distinct storages that autograd holds, parameters left out."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters, self.users, self.now, self.peak = parameters, {}, 0, 0

    def pack(self, tensor: torch.Tensor) -> object:
        return tensor if tensor.untyped_storage().data_ptr() in self.parameters else Held(tensor, self)

    def unpack(self, held: Any) -> torch.Tensor:
        return held.tensor if isinstance(held, Held) else held


def step_peak(config: RunConfig, prepare: Callable[[Engine], None] | None = None) -> tuple[int, int]:
    """(stage, peak bytes held) of one training step.

    Args:
        prepare: changes the engine before it.
    """
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        if prepare is not None:
            prepare(engine)
        if ctx.replicas > 1:
            for model in engine.models:
                return_weight_gradients(model)
        skip = {p.untyped_storage().data_ptr() for c in engine.chunks for p in c.parameters()}
        for model in engine.models:  # RoPE's tables are made once and kept: no activation
            for layer in model.decoder.layers:
                tables = layer.self_attention.core_attention.tables
                if tables is not None:
                    length, device = config.train.seq_length, ctx.platform.device
                    made = [*tables.tables(length, device)]
                    if config.model.position.kind == "nlpe":
                        made += [t for t in tables.far_angles(config.model.position, length, device) if t is not None]
                    skip |= {t.untyped_storage().data_ptr() for t in made}
        meter = Meter(skip)
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
            train_steps(engine, config, 1)
        assert meter.now == 0
        return ctx.pp_rank, meter.peak


def check(name: str, config: RunConfig) -> None:
    ranks = (LAYOUTS | LAYOUTS_OF_SHARED_GROUPS)[name][0]
    layout = Layout.of(config, ranks)
    for stage, found in run_ranks(ranks, step_peak, config):
        planned = saved_activation_bytes(
            config.model,
            layout,
            stage,
            seq_length=config.train.seq_length,
            precision=config.train.precision,
            ops=operators_of(config.kernels, cuda=False),
        )
        assert planned == pytest.approx(found, rel=0.05), f"stage {stage}: planned {planned:,.0f}, held {found:,}"


@pytest.mark.parametrize(
    ("recompute", "model"), [("none", {}), ("selective", {}), ("none", {"model__position": {"kind": "alibi"}})], ids=str
)
def test_activations_of_ranks_that_share_a_kv_group_are_planned_too(recompute, model, tmp_path):
    layout = LAYOUTS_OF_SHARED_GROUPS["tp4 sp"][1]
    config = tiny_config(
        tmp_path,
        parallel=layout,
        train__seq_length=256,
        train__global_batch_size=4,
        train__recompute=recompute,
        **model,
    )
    check("tp4 sp", config)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_activations_are_within_5_percent_of_what_a_step_holds(name, recompute, tmp_path):
    config = tiny_config(
        tmp_path,
        parallel=LAYOUTS[name][1],
        train__recompute=recompute,
        train__precision="bf16",
        train__micro_batch_size=2,
        train__global_batch_size=16,
    )
    check(name, config)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_fp32_and_one_kv_head_a_query_head_are_planned_too(recompute, tmp_path):
    config = tiny_config(tmp_path, model__num_query_groups=4, train__recompute=recompute)
    check("one process", config)


def step_peaks(configs: list[RunConfig]) -> list[int]:
    return [step_peak(config)[1] for config in configs]


def test_context_parallel_activations_are_planned(tmp_path):
    """Gathered keys and values are of one layer at a time: a rank keeps its own part."""
    archs = [{}, {"model__qk_norm": True}, {"model__position": {"kind": "alibi"}, "model__num_query_groups": 4}]
    configs = [
        tiny_config(
            tmp_path,
            parallel={"cp": 2, "cp_kind": kind},
            train__recompute=recompute,
            train__precision="bf16",
            train__seq_length=128,
            **arch,
        )
        for kind in ("gather", "a2a")
        for recompute, arch in (("none", archs[0]), ("none", archs[1]), ("none", archs[2]), ("full", archs[0]))
    ] + [tiny_config(tmp_path, parallel={"cp": 2}, train__recompute="selective", train__seq_length=128)]
    for config, found in zip(configs, run_ranks(2, step_peaks, configs)[0], strict=True):
        layout, ops = Layout.of(config, 2), operators_of(config.kernels, cuda=False)
        planned = saved_activation_bytes(
            config.model, layout, 0, seq_length=128, precision=config.train.precision, ops=ops
        )
        name = f"{config.parallel.cp_kind}, {config.train.recompute}, {config.model}"
        assert planned == pytest.approx(found, rel=0.05), f"{name}: planned {planned:,.0f}, held {found:,}"


EXPERTS = {"count": 8, "top_k": 2, "ffn_hidden_size": 48}
GATED = {**EXPERTS, "shared_ffn_hidden_size": 40, "shared_gate": True, "balance": "sequence", "z_loss": 1e-3}
SIGMOID = {**EXPERTS, "score": "sigmoid", "bias_rate": 0.01, "dense_layers": 1}
SP = {"tp": 2, "sp": True}
# name -> (ranks, experts, layout, changes)
EXPERT_CASES = {
    "balance of a batch, dense first layers": (1, {**EXPERTS, "dense_layers": 2}, {}, {}),
    "scores of all experts": (1, {**EXPERTS, "normalize": False, "balance": "none", "z_loss": 1e-3}, {}, {}),
    "shared and gated": (1, GATED, {}, {}),
    "sigmoid": (1, SIGMOID, {}, {"train__recompute": "selective"}),
    "groups": (1, {**SIGMOID, "groups": 2, "top_groups": 1, "group_score": "max"}, {}, {}),
    "full recompute, torch kernels": (1, SIGMOID, {}, {"train__recompute": "full", "train__precision": "fp32"}),
    "ep2": (2, {**SIGMOID, "groups": 4, "top_groups": 2}, {"ep": 2}, {}),
    "ep2, shared and gated": (2, GATED, {"ep": 2}, {}),
    "ep2, full recompute": (2, EXPERTS, {"ep": 2}, {"train__recompute": "full"}),
    "tp2 sp": (2, GATED, SP, {}),
    "tp2 sp, ep2": (2, {**EXPERTS, "shared_ffn_hidden_size": 40}, {**SP, "ep": 2}, {}),
    "ep4": (4, EXPERTS, {"ep": 4}, {}),
    "tp2 sp, ep4": (4, SIGMOID, {**SP, "ep": 4}, {}),
    "cp2 x ep2": (4, EXPERTS, {"cp": 2, "ep": 2}, {}),
    "pp2 vpp2, dense first layers": (2, {**EXPERTS, "dense_layers": 2}, {"pp": 2, "vpp": 2}, {}),
    "pp2 x ep2": (4, {**EXPERTS, "dense_layers": 2}, {"pp": 2, "ep": 2}, {}),
}


def all_step_peaks(configs: list[RunConfig]) -> list[tuple[int, int]]:
    return [step_peak(config) for config in configs]


def expert_config(tmp_path, experts: dict, parallel: dict, changes: dict) -> RunConfig:
    fixed = {"train__precision": "bf16", "train__micro_batch_size": 2, "train__global_batch_size": 16}
    return tiny_config(tmp_path, parallel=parallel, model__experts=experts, **{**fixed, **changes})


def planned_bytes(config: RunConfig, ranks: int, stage: int, imbalance: float) -> float:
    layout = replace(Layout.of(config, ranks), imbalance=imbalance)
    numbers = {"seq_length": config.train.seq_length, "precision": config.train.precision}
    return saved_activation_bytes(config.model, layout, stage, ops=operators_of(config.kernels, cuda=False), **numbers)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_activations_of_experts_are_planned(ranks, tmp_path):
    """All tokens go somewhere: the mean over expert-parallel ranks is that of an even load."""
    cases = {name: case[1:] for name, case in EXPERT_CASES.items() if case[0] == ranks}
    configs = [expert_config(tmp_path, *case) for case in cases.values()]
    found = run_ranks(ranks, all_step_peaks, configs)
    for number, (name, config) in enumerate(zip(cases, configs, strict=True)):
        peaks = sorted(results[number] for results in found)
        for stage, group in itertools.groupby(peaks, key=lambda peak: peak[0]):
            held, planned = mean(peak for _, peak in group), planned_bytes(config, ranks, stage, 1.0)
            assert planned == pytest.approx(held, rel=0.05), f"{name}, stage {stage}: {planned:,.0f}, held {held:,.0f}"


def collapse(engine: Engine) -> None:
    """Every token goes to the first two experts."""
    for router in engine.routers:
        router.expert_bias.data[:2] += 10.0


def test_the_rank_with_the_most_tokens_is_planned_with_its_imbalance(tmp_path):
    config = expert_config(tmp_path, {**SIGMOID, "dense_layers": []}, {"ep": 2}, {})
    most, least = (peak for _, peak in run_ranks(2, step_peak, config, collapse))
    assert planned_bytes(config, 2, 0, 2.0) == pytest.approx(most, rel=0.05)
    assert planned_bytes(config, 2, 0, 0.0) == pytest.approx(least, rel=0.05)
    assert most > 1.5 * least
    assert planned_bytes(config, 2, 0, 9.0) == planned_bytes(config, 2, 0, 2.0)  # no rank can get more than all


FEATURES = {
    "qk_norm": {"model__qk_norm": True},
    "alibi": {"model__position": {"kind": "alibi"}, "model__num_query_groups": 4},
    "norm_head": {"model__norm_head": True},
    "qkv_bias": {"model__qkv_bias": True},
    "sliding window": {"model__sliding_window": 5},
    "nlpe, clipped": {"model__position": {"kind": "nlpe", "threshold": 7}},
    "nlpe, compressed": {"model__position": {"kind": "nlpe", "threshold": 7, "far": "compressed", "far_factor": 4.0}},
}


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("feature", FEATURES)
def test_what_families_add_is_planned(feature, recompute, tmp_path):
    config = tiny_config(
        tmp_path, train__precision="bf16", train__recompute=recompute, train__micro_batch_size=2, **FEATURES[feature]
    )
    check("one process", config)


LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
ATTENTIONS = {
    "latent": {"latent_attention": {**LATENT, "q_lora_rank": 32}, "num_query_groups": 4},
    "latent, whole q, v as wide as k": {"latent_attention": {**LATENT, "v_head_dim": 24}, "num_query_groups": 4},
    "norm over the projection": {"qk_norm": True, "qk_norm_over": "projection"},
}


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", ["one process", "tp2 sp"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_latent_attention_and_wide_norms_hold_what_is_planned(kind, name, recompute, tmp_path):
    model = {"ffn_hidden_size": 32, "vocab_size": 120, **ATTENTIONS[kind]}
    changes = {f"model__{key}": value for key, value in model.items()}
    changes |= {"train__recompute": recompute, "train__precision": "bf16", "train__micro_batch_size": 2}
    check(name, tiny_config(tmp_path, parallel=LAYOUTS[name][1], train__global_batch_size=8, **changes))


def test_a_step_of_16k_tokens_holds_what_is_planned(tmp_path):
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "ffn_hidden_size": 48,
        "vocab_size": 250,
    }
    yarn = {"scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}
    for recompute in ("none", "full"):
        config = tiny_config(
            tmp_path,
            model={"num_layers": 1, "position": yarn, **shape},
            train__seq_length=16384,
            train__global_batch_size=1,
            train__recompute=recompute,
        )
        check("one process", config)


@pytest.mark.parametrize("name", ["one process", "tp2 sp"])
def test_a_step_with_the_fused_head_holds_what_is_planned_and_less_than_without(name, tmp_path):
    held = {}
    for choice in ("off", "fused"):
        changes = {"model__vocab_size": 2000, "kernels__linear_cross_entropy": choice, "train__recompute": "full"}
        config = tiny_config(tmp_path, parallel=LAYOUTS[name][1], train__micro_batch_size=4, **changes)
        check(name, config)
        held[choice] = max(peak for _, peak in run_ranks(LAYOUTS[name][0], step_peak, config))
    assert held["fused"] < 0.7 * held["off"]


A, S, B, H, T = 64, 2048, 4, 6144, 8  # Korthikanti et al.'s 22B model


@pytest.mark.parametrize(
    ("sp", "recompute", "per_sbh"),
    [
        (False, "none", 10 + 24 / T + 5 * A * S / (H * T)),
        (True, "none", (34 + 5 * A * S / H) / T),
        (False, "selective", 10 + 24 / T),
        (True, "selective", 34 / T),
        (False, "full", 2),
    ],
)
def test_a_gpt_layer_saves_what_korthikanti_et_al_say_it_saves(sp, recompute, per_sbh):
    """Their table 2, in units of s b h bytes."""
    shape = Shape.gpt(layers=48, hidden=H, heads=A)
    layout = Layout(tp=T, sp=sp, micro_batch_size=B, recompute=recompute)
    assert layer_bytes(shape, layout, S, 2, FUSED) / (S * B * H) == pytest.approx(per_sbh, rel=1e-12)


def test_fused_operators_save_only_inputs_and_a_number_a_row():
    arch = ModelArch(num_layers=1, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96, vocab_size=250)
    shape, layout = Shape.of(arch), Layout()
    torch_names = {s.name: s.bytes for s in layer_saves(shape, layout, 32, 2, Operators())}
    fused_names = {s.name: s.bytes for s in layer_saves(shape, layout, 32, 2, FUSED)}
    assert torch_names["silu(gate)"] == 32 * 96 * 2
    assert "silu(gate)" not in fused_names
    assert fused_names["MLP norm"] == 32 * (64 * 2 + 4)
    assert torch_names["MLP norm"] == 32 * (64 * 8 + 4)


@pytest.mark.parametrize(
    ("cuda", "choice", "fused"),
    [(True, "auto", True), (False, "auto", False), (False, "fused", True), (True, "off", False)],
)
def test_the_fused_head_is_planned_where_it_runs(cuda, choice, fused):
    found = operators_of(Kernels(linear_cross_entropy=choice), cuda=cuda)
    assert found == (FUSED_ON_GPU if fused else FUSED)


def test_the_fused_head_saves_its_input_and_numbers_a_token_and_holds_a_chunk_of_logits():
    s, b, h, v = 96, 2, 64, 256
    hidden, weight = torch.randn(s, b, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    meter = Meter({weight.untyped_storage().data_ptr()})
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
        labels = torch.randint(0, v, (b, s)).t()
        loss = fused_linear_cross_entropy(hidden, weight, labels, reduction="none")
    arch = ModelArch(num_layers=1, hidden_size=h, num_attention_heads=4, ffn_hidden_size=96, vocab_size=v)
    shape, layout = Shape.of(arch), Layout(micro_batch_size=b)
    norm, *head = head_saves(shape, layout, s, 4, FUSED_ON_GPU)
    assert norm.name == "final norm"
    assert sum(saved.bytes for saved in head) == meter.now
    del loss
    for rows, hidden_size, vocab, tp in ((8192, 4096, 100352, 1), (512, 64, 256, 1), (65536, 8192, 32000, 8)):
        shape = Shape(layers=1, hidden=hidden_size, heads=8, groups=8, head_dim=8, ffn=8, vocab=vocab)
        chunk = default_chunk_tokens(rows, hidden_size, vocab // tp)
        assert logits_for_a_moment(shape, Layout(tp=tp), rows, FUSED_ON_GPU) == chunk * vocab / tp
        assert logits_for_a_moment(shape, Layout(tp=tp), rows, FUSED) == rows * vocab / tp
