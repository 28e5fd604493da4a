"""The kernels in the model: Triton (interpreted) and torch train alike; ALiBi, windows and NLPE mean what they say."""

import importlib
import math

import pytest
import torch

from flagscale_like.config import RunConfig
from flagscale_like.errors import ConfigError
from flagscale_like.model.attention import RotaryTables, alibi_slopes
from flagscale_like.model.build import build_chunks, check_platform
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from tests.harness import REPOSITORY, build_engine, run_ranks, tiny_config, train_steps

OPERATORS = ("attention", "rope", "rms_norm", "swiglu", "cross_entropy")
POSITIONS = {
    "rope": {"position": {"kind": "rope"}},
    "alibi": {"position": {"kind": "alibi"}},
    "window": {"sliding_window": 7},
    "nlpe clipped": {"position": {"kind": "nlpe", "threshold": 5}},
    "nlpe compressed": {"position": {"kind": "nlpe", "threshold": 5, "far": "compressed", "far_factor": 4.0}},
}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.3}
DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
SCALED = {
    f"{name}, {scaling['kind']}": {"position": POSITIONS[name]["position"] | {"scaling": scaling}}
    for name in ("rope", "nlpe clipped", "nlpe compressed")
    for scaling in (YARN, DYNAMIC)
}


def config_of(tmp_path, backend: str, name: str = "rope", **changes) -> RunConfig:
    model = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 80,
        "vocab_size": 100,
        **(POSITIONS | SCALED)[name],
    }
    kernels = dict.fromkeys(OPERATORS, backend)
    sizes = {"train__seq_length": 16, "train__global_batch_size": 2}
    return tiny_config(tmp_path, model=model, kernels=kernels, **sizes, **changes)


def train_two_steps(config: RunConfig) -> list[tuple[float, float]]:
    with parallel_context(config.parallel) as ctx:
        return train_steps(build_engine(config, ctx), config, 2)


def train_two_steps_interpreted(config: RunConfig) -> list[tuple[float, float]]:
    """With the kernel tests' interpreter, which is quicker than Triton's own and refuses to leave a tensor."""
    importlib.import_module("interpreter_fixes").install()
    return train_two_steps(config)


@pytest.mark.parametrize("name", POSITIONS)
def test_triton_and_torch_train_alike(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "kernels")  # the ranks have this path too
    (torch_losses,) = run_ranks(1, train_two_steps, config_of(tmp_path, "torch", name))
    (triton_losses,) = run_ranks(1, train_two_steps_interpreted, config_of(tmp_path, "triton", name))
    assert triton_losses == [pytest.approx(pair, rel=1e-5) for pair in torch_losses]
    assert torch_losses[0] != torch_losses[1]


@pytest.mark.parametrize("name", ["alibi", "nlpe clipped", "window"])
def test_tensor_parallel_ranks_use_their_own_slopes_and_heads(name, tmp_path):
    (one,) = run_ranks(1, train_two_steps, config_of(tmp_path, "torch", name))
    two = run_ranks(2, train_two_steps, config_of(tmp_path, "torch", name, parallel={"tp": 2, "sp": True}))
    assert two[0] == [pytest.approx(pair, rel=1e-5) for pair in one]


def attention_of(config: RunConfig, seed: int) -> tuple:
    """One layer's core attention on random q, k, v: (q, k, v, out) as arrays."""
    with parallel_context(config.parallel) as ctx:
        (model,) = build_chunks(ModelSpec.of(config), ctx)
        core = model.decoder.layers[0].self_attention.core_attention
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(16, 2, n, 16, generator=generator) for n in (4, 2, 2))
        return tuple(t.numpy() for t in (q, k, v, core(q.clone(), k.clone(), v.clone())))


def rotated(x: torch.Tensor, places: torch.Tensor, arch) -> torch.Tensor:
    """x [s, b, n, d] turned by RoPE to the given positions [s], from the formulas."""
    half, base, turned, scaling = arch.head_dim // 2, arch.position.base, x, arch.position.scaling
    frequencies = base ** (-torch.arange(half) / half)
    if scaling is not None and scaling.kind == "yarn":
        # the bounds of the ramp, as indices of frequencies that turn beta_fast and beta_slow times
        low, high = (
            half * math.log(scaling.original_max_position_embeddings / (2 * math.pi * beta), base)
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
        ramp = ((torch.arange(half) - low) / (high - low)).clamp(0, 1)
        assert ramp[0] < 1 < ramp.sum()  # or the comparison would say little
        frequencies = frequencies * (1 - ramp) + frequencies / scaling.factor * ramp
        turned = x * scaling.attention_factor
    elif scaling is not None:
        longer = scaling.factor * len(places) / scaling.original_max_position_embeddings - (scaling.factor - 1)
        frequencies = (base * longer ** (half / (half - 1))) ** (-torch.arange(half) / half)
    angle = places[:, None] * frequencies
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    first, second = turned[..., :half], turned[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def expected_attention(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch) -> torch.Tensor:
    """The definition, with all scores at once."""
    s, position = q.shape[0], arch.position
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    true = torch.arange(s, dtype=torch.float32)
    distance = true[:, None] - true[None]

    def scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ibnd,jbnd->bnij", a, b) / math.sqrt(arch.head_dim)

    if position.kind == "alibi":
        found = scores(q, k) - alibi_slopes(4)[:, None, None] * distance
    else:
        found = scores(rotated(q, true, arch), rotated(k, true, arch))
    if position.kind == "nlpe":
        w = float(position.threshold)
        if position.far == "clipped":
            far = scores(rotated(q, torch.full((s,), w), arch), rotated(k, torch.zeros(s), arch))
        else:
            c = position.far_factor
            far = scores(rotated(q, w - w / c + true / c, arch), rotated(k, true / c, arch))
        found = torch.where(distance >= w, far, found)
    hidden = distance < 0
    if arch.sliding_window:
        hidden |= distance >= arch.sliding_window
    return torch.einsum("bnij,jbnd->ibnd", found.masked_fill(hidden, -math.inf).softmax(-1), v).flatten(2)


@pytest.mark.parametrize("name", POSITIONS | SCALED)
def test_attention_is_what_its_definition_says(name, tmp_path):
    config = config_of(tmp_path, "torch", name)
    ((q, k, v, out),) = run_ranks(1, attention_of, config, 0)
    expected = expected_attention(name, *map(torch.from_numpy, (q, k, v)), config.model)
    torch.testing.assert_close(torch.from_numpy(out), expected, atol=2e-6, rtol=1e-5)


def test_beyond_the_threshold_a_clipped_score_depends_on_no_distance(tmp_path):
    arch = config_of(tmp_path, "torch", "nlpe clipped").model
    far_q, far_k = RotaryTables(arch).far_angles(arch.position, 9, torch.device("cpu"))
    assert far_k is None
    assert torch.equal(far_q, far_q[:1].expand_as(far_q))


def test_triton_without_cuda_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cpu = CpuPlatform()
    with pytest.raises(ConfigError, match="kernels.attention is triton, which does not run on cpu"):
        check_platform(ModelSpec.of(config_of(tmp_path, "triton")), cpu)
    check_platform(ModelSpec.of(config_of(tmp_path, "auto")), cpu)
