"""Published measurements that the planner is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flagscale_like.arch import Experts, LatentAttention, ModelArch
from flagscale_like.cluster import EfficiencyKind, parse_cluster
from flagscale_like.planner.efficiency import Efficiency
from flagscale_like.planner.layout import Layout, Recompute, Shape
from flagscale_like.planner.throughput import Software, StepTime, step_time


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published row: a model, its layout, and what was measured.

    Attributes:
        figure, unit: TFLOP/s a device with the layers' recompute counted (`flops`) or not (`model flops`; `causal flops`: of
            attention the half that is computed), seconds a step, tokens/s a device, or MFU.
        precision: of the matrix products, as the source writes it. The planner's are bf16's whatever it is.
        today: data-parallel traffic overlaps compute, and stages send whole activations. The older rows have neither.
    """

    name: str
    shape: Shape
    layout: Layout
    cluster: str
    figure: float
    unit: str
    seq_length: int = 2048
    precision: str = "bf16"
    today: bool = False

    def plan(self, eff: Efficiency | None = None) -> StepTime:
        return step_time(
            self.shape,
            self.layout,
            parse_cluster(self.cluster),
            seq_length=self.seq_length,
            eff=eff,
            software=Software(overlap_dp=self.today, scatter_gather=not self.today),
        )

    def ours(self, eff: Efficiency | None = None) -> float:
        time = self.plan(eff)
        if self.unit == "seconds":
            return time.seconds
        if self.unit == "mfu":
            return time.mfu
        if self.unit == "tokens/s":
            return time.tokens_per_s_per_device
        flops = self.shape.model_flops(time.tokens, self.seq_length, recompute_layers=self.unit == "flops")
        if self.unit == "causal flops":
            flops -= time.tokens * 3 * self.shape.masked_flops(self.seq_length)
        return flops / time.seconds / time.devices / 1e12

    @property
    def mfu(self) -> float:
        """The MFU that was published, whatever its unit: model FLOPs without recompute, of the device's dense peak."""
        faster = self.figure / self.ours()
        return self.plan().mfu * (1 / faster if self.unit == "seconds" else faster)

    @property
    def efficiency(self) -> EfficiencyKind:
        return parse_cluster(self.cluster).device.efficiency

    def describe(self) -> str:
        return f"{self.name} on {self.cluster}, {self.layout.describe()}"


def _gpt(  # many parameters: the columns of the tables below, one call a row
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    tp: int,
    pp: int,
    vpp: int,
    gpus: int,
    micro: int,
    batch: int,
    figure: float,
    unit: str,
    *,
    sp: bool = False,
    recompute: Recompute = "full",
) -> Row:
    dp = gpus // (tp * pp)
    layout = Layout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        sp=sp,
        micro_batch_size=micro,
        num_microbatches=batch // (micro * dp),
        recompute=recompute,
    )
    nodes = f"{gpus // 8}x8xA100-80"
    return Row(
        name=name,
        shape=Shape.gpt(layers=layers, hidden=hidden, heads=heads),
        layout=layout,
        cluster=nodes,
        figure=figure,
        unit=unit,
    )


# Narayanan et al. 2021 (arXiv:2104.04473), table 1: achieved TFLOP/s a GPU. Micro-batch sizes and layers a virtual stage are
# those of the run scripts the authors published beside it (Megatron-LM, examples/sc21/run_table_1.sh).
NARAYANAN_2021 = [
    _gpt("1.7B", 24, 2304, 24, 1, 1, 1, 32, 16, 512, 137, "flops"),
    _gpt("3.6B", 30, 3072, 32, 2, 1, 1, 64, 16, 512, 138, "flops"),
    _gpt("7.5B", 36, 4096, 32, 4, 1, 1, 128, 16, 512, 142, "flops"),
    _gpt("18.4B", 40, 6144, 48, 8, 1, 1, 256, 8, 1024, 135, "flops"),
    _gpt("39.1B", 48, 8192, 64, 8, 2, 1, 512, 4, 1536, 138, "flops"),
    _gpt("76.1B", 60, 10240, 80, 8, 4, 3, 1024, 2, 1792, 140, "flops"),
    _gpt("145.6B", 80, 12288, 96, 8, 8, 2, 1536, 2, 2304, 148, "flops"),
    _gpt("310.1B", 96, 16384, 128, 8, 16, 2, 1920, 1, 2160, 155, "flops"),
    _gpt("529.6B", 105, 20480, 128, 8, 35, 3, 2520, 1, 2520, 163, "flops"),
    _gpt("1008.0B", 128, 25600, 160, 8, 64, 1, 3072, 1, 3072, 163, "flops"),
]

# Korthikanti et al. 2022 (arXiv:2205.05198), tables 3 and 5: seconds a step with full recompute, and with sequence
# parallelism and selective recompute.
KORTHIKANTI_2022 = [
    row
    for name, layers, hidden, heads, pp, vpp, gpus, micro, batch, full, present in (
        ("22B", 48, 6144, 64, 1, 1, 8, 4, 4, 1.42, 1.10),
        ("175B", 96, 12288, 96, 8, 3, 64, 1, 64, 18.13, 13.75),
        ("530B", 105, 20480, 128, 35, 3, 280, 1, 280, 49.05, 37.83),
        ("1T", 128, 25600, 160, 64, 1, 512, 1, 512, 94.42, 71.49),
    )
    for row in (
        _gpt(f"{name}, full", layers, hidden, heads, 8, pp, vpp, gpus, micro, batch, full, "seconds"),
        _gpt(
            f"{name}, sp + selective",
            layers,
            hidden,
            heads,
            8,
            pp,
            vpp,
            gpus,
            micro,
            batch,
            present,
            "seconds",
            sp=True,
            recompute="selective",
        ),
    )
]

# Baichuan-7B's model card: 182 TFLOP/s, 58.3 % of peak, on about 1000 A800; 4 M tokens a step is an assumption. No constant
# is chosen by this row and the next.
BAICHUAN_7B = Row(
    name="Baichuan-7B",
    shape=Shape(layers=32, hidden=4096, heads=32, groups=32, head_dim=128, ffn=11008, vocab=64000),
    layout=Layout(tp=2, dp=504, sp=True, micro_batch_size=2, num_microbatches=1),
    cluster="126x8xA800",
    figure=182,
    unit="model flops",
    seq_length=4096,
    today=True,
)

AQUILA2_34B = Row(
    name="Aquila2-34B",
    shape=Shape(layers=60, hidden=6144, heads=48, groups=8, head_dim=128, ffn=24576, vocab=100352),
    layout=Layout(tp=4, pp=4, dp=32, sp=True, num_microbatches=32),
    cluster="64x8xA100-40",
    figure=666,
    unit="tokens/s",
    seq_length=4096,
    today=True,
)

# Megatron-LM's README, 2024: GPT-3 175B, batch 1152, 4096 tokens, vocabulary 131072: 47 % MFU on 96 H100, 42 % on 4608. The
# layouts are not published; tp 8, pp 12, vpp 8 fit both.
GPT3_H100 = [
    Row(
        name=f"GPT-3 175B, {gpus} H100",
        shape=replace(Shape.gpt(layers=96, hidden=12288, heads=96, vocab=131072), flash=True, dropout=False),
        layout=Layout(tp=8, pp=12, vpp=8, dp=gpus // 96, sp=True, num_microbatches=1152 // (gpus // 96)),
        cluster=f"{gpus // 8}x8xH100",
        figure=mfu,
        unit="mfu",
        seq_length=4096,
        today=True,
    )
    for gpus, mfu in ((96, 0.47), (4608, 0.42))
]

_QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_query_groups": 4, "head_dim": 128, "qk_norm": True}
MIXTRAL_8X7B = ModelArch(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    vocab_size=32000,
    experts=Experts(count=8, top_k=2, ffn_hidden_size=14336),
)
QWEN3_30B_A3B = ModelArch(
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    ffn_hidden_size=6144,
    experts=Experts(count=128, top_k=8, ffn_hidden_size=768),
    **_QWEN3,
)
QWEN3_235B_A22B = ModelArch(
    num_layers=94,
    hidden_size=4096,
    num_attention_heads=64,
    ffn_hidden_size=12288,
    experts=Experts(count=128, top_k=8, ffn_hidden_size=1536),
    **_QWEN3,
)
# Without its layer for multi-token prediction.
DEEPSEEK_V3 = ModelArch(
    num_layers=61,
    hidden_size=7168,
    num_attention_heads=128,
    ffn_hidden_size=18432,
    vocab_size=129280,
    latent_attention=LatentAttention(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    experts=Experts(
        count=256,
        top_k=8,
        ffn_hidden_size=2048,
        shared_ffn_hidden_size=2048,
        score="sigmoid",
        scale=2.5,
        groups=8,
        top_groups=4,
        balance="sequence",
        bias_rate=0.001,
        dense_layers=3,
    ),
)


def _experts(  # many parameters: the columns of the table below, one call a row
    name: str,
    arch: ModelArch,
    gpus: int,
    batch: int,
    micro: int,
    tp: int,
    pp: int,
    vpp: int,
    ep: int,
    figure: float,
    *,
    precision: str = "FP8",
    unit: str = "tokens/s",
    ends: tuple[int, int] | None = None,
) -> Row:
    """One row on H100, 4,096 tokens a sequence, the load even.

    Args:
        ends: layers of the first and of the last stage, where they are fewer: the embedding and the head count as layers.
    """
    dp = gpus // (tp * pp)
    layout = Layout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        ep=ep,
        sp=tp > 1,
        micro_batch_size=micro,
        num_microbatches=batch // (micro * dp),
        first_stage_layers=ends[0] if ends else None,
        last_stage_layers=ends[1] if ends else None,
        imbalance=1.0,
    )
    return Row(
        name=name,
        shape=Shape.of(arch, tp),
        layout=layout,
        cluster=f"{gpus // 8}x8xH100",
        figure=figure,
        unit=unit,
        seq_length=4096,
        precision=precision,
        today=True,
    )


# Megatron-LM, megatron/core/transformer/moe/README.md: "468 TFLOPS for Mixtral 8X7B bf16 training" with Megatron-Core 0.9.
# Layout and cluster are the "reference best parallel mapping" of 0.8 there, which has no figure of its own.
# NVIDIA's Megatron Bridge, docs/performance-summary-archive.md, DGX-H100, by the release of the NeMo container: the load is
# forced to be even. DeepSeek-V3 has multi-token prediction there (1,297 tokens/s are 338 TFLOP/s, 4 % more FLOPs a token than
# without it), DeepEP, and an all-to-all that runs beside compute (Megatron-MoE-ModelZoo, best_practice/DeepSeekV3/readme.md).
# Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md: seconds a step, norms and activations recomputed.
# No constant was chosen by these rows.
EXPERTS_H100 = [
    _experts(
        *("Mixtral 8x7B (Megatron-Core 0.9)", MIXTRAL_8X7B, 64, 256, 1, 1, 4, 8, 8, 468),
        precision="bf16",
        unit="model flops",
    ),
    _experts("Qwen3-30B-A3B (Bridge, 25.11)", QWEN3_30B_A3B, 16, 512, 2, 1, 2, 24, 8, 5275),
    _experts("Qwen3-30B-A3B (Bridge, 26.02)", QWEN3_30B_A3B, 16, 1024, 1, 1, 2, 12, 8, 5113),
    _experts("Qwen3-235B-A22B (Bridge, 25.11)", QWEN3_235B_A22B, 256, 2048, 1, 2, 8, 4, 32, 1575, ends=(11, 11)),
    _experts("Qwen3-235B-A22B (Bridge, 26.02)", QWEN3_235B_A22B, 256, 8192, 1, 2, 8, 4, 32, 1633, ends=(11, 11)),
    _experts(
        *("Qwen3-235B-A22B (ModelZoo, all-to-all)", QWEN3_235B_A22B, 256, 2048, 1, 2, 32, 3, 8),
        2048 * 4096 / 256 / 24.2,
        precision="bf16",
        ends=(2, 2),
    ),
    _experts(
        *("Qwen3-235B-A22B (ModelZoo, DeepEP)", QWEN3_235B_A22B, 256, 2048, 1, 2, 8, 4, 32),
        2048 * 4096 / 256 / 19.7,
        precision="bf16",
        ends=(11, 11),
    ),
    _experts("DeepSeek-V3 (Bridge, 25.09)", DEEPSEEK_V3, 1024, 8192, 1, 2, 8, 4, 64, 1297, ends=(7, 6)),
]

_LLAMA3: dict[str, Any] = {"num_query_groups": 8, "vocab_size": 128256}
LLAMA3_70B = ModelArch(num_layers=80, hidden_size=8192, num_attention_heads=64, ffn_hidden_size=28672, **_LLAMA3)
LLAMA3_405B = ModelArch(num_layers=126, hidden_size=16384, num_attention_heads=128, ffn_hidden_size=53248, **_LLAMA3)


def _llama(  # many parameters: the columns of the tables below, one call a row
    name: str,
    arch: ModelArch,
    gpus: int,
    batch: int,
    pp: int,
    vpp: int,
    cp: int,
    figure: float,
    *,
    tp: int = 8,
    unit: str = "seconds",
    seq_length: int = 8192,
    ends: tuple[int, int] | None = None,
) -> Row:
    """One row on H100 in bf16, micro-batches of one row.

    Args:
        ends: layers of the first and of the last stage, where they are fewer.
    """
    dp = gpus // (tp * pp * cp)
    layout = Layout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        dp=dp,
        sp=True,
        num_microbatches=batch // dp,
        first_stage_layers=ends[0] if ends else None,
        last_stage_layers=ends[1] if ends else None,
    )
    return Row(
        name=f"{name}, {gpus} H100",
        shape=Shape.of(arch, tp),
        layout=layout,
        cluster=f"{gpus // 8}x8xH100",
        figure=figure,
        unit=unit,
        seq_length=seq_length,
        today=True,
    )


# NVIDIA's dgxc-benchmarking, llama3.1/README_70b.md and README_405b.md (NeMo 24.09, BF16): seconds a step, with context
# parallelism. No constant was chosen by these rows.
LLAMA3_H100 = [
    _llama("Llama-3.1 70B", LLAMA3_70B, 64, 128, 4, 5, 2, 14.72, tp=4),
    _llama("Llama-3.1 70B", LLAMA3_70B, 512, 1024, 4, 5, 2, 14.89, tp=4),
    _llama("Llama-3.1 70B", LLAMA3_70B, 2048, 4096, 4, 5, 2, 14.98, tp=4),
    _llama("Llama-3.1 405B", LLAMA3_405B, 576, 252, 9, 7, 2, 17.20),
    _llama("Llama-3.1 405B", LLAMA3_405B, 1152, 504, 9, 7, 2, 17.52),
    _llama("Llama-3.1 405B", LLAMA3_405B, 2304, 1008, 9, 7, 2, 17.62),
]

# Dubey et al. 2024 (arXiv:2407.21783), table 4: TFLOP/s a GPU of the production run. The first and the last stage have a
# layer less. The number of chunks is not published; 8, a layer a chunk, is an assumption. The table gives dp 4 for the last
# row; its 16,384 devices and 16 M tokens a step are those of dp 8. How FLOPs are counted is not said; with all of attention
# the row of 128k tokens would be computed at half the speed of the others. No constant was chosen by these rows.
LLAMA3_PRODUCTION = [
    _llama("Llama-3 405B", LLAMA3_405B, 8192, 2048, 16, 8, 1, 430, unit="causal flops", ends=(7, 7)),
    _llama("Llama-3 405B", LLAMA3_405B, 16384, 2048, 16, 8, 1, 400, unit="causal flops", ends=(7, 7)),
    _llama(
        *("Llama-3 405B, 128k", LLAMA3_405B, 16384, 128, 16, 8, 16, 380),
        unit="causal flops",
        seq_length=131072,
        ends=(7, 7),
    ),
]

# Those that the constants of efficiency.py were chosen by: Ampere's by a fit (benchmarks/planner/fit.py), Hopper's by hand.
FITTED: list[Row] = [*NARAYANAN_2021, *KORTHIKANTI_2022, *GPT3_H100]
