"""Who provides the operators of the benchmark: our kernels, plain PyTorch, and the other implementations that are installed.

A provider takes a workload and returns the call to time. Other implementations are imported when they are timed.
"""

import importlib.util
from typing import Any

import torch

from flagscale_kernels._attention_launch import ORDERED_VARIABLE
from flagscale_kernels._rivals import ALWAYS, RIVALS_VARIABLE

OURS = "flagscale_kernels"
GLUON = f"{OURS} in Gluon"  # our kernels for Hopper, chosen or not
ORDERED, ADDED = f"{OURS}, dQ in order", f"{OURS}, dQ by atomics"  # five products instead of seven
ENVIRONMENT = {
    GLUON: {RIVALS_VARIABLE: ALWAYS},
    ORDERED: {ORDERED_VARIABLE: "1"},
}  # the variables that a provider runs with


def _installed(package):
    return importlib.util.find_spec(package) is not None


def providers(workload):
    """{name: provider} for the workload, ours first."""
    found: dict[str, Any] = {OURS: lambda w: w.ours}
    if workload.added is not None:
        found |= {ORDERED: lambda w: w.ours, ADDED: lambda w: w.added}
    if workload.other_code:  # the definition holds all scores in memory, and other implementations lack most of these
        return found | ({} if torch.cuda.is_available() else {"torch": lambda w: w.reference})
    found["torch"] = lambda w: w.reference
    if not torch.cuda.is_available():
        return found
    if workload.operator == "flash_attention" and torch.cuda.get_device_capability()[0] == 9:
        found = {OURS: found.pop(OURS), GLUON: lambda w: w.ours} | found
    found |= {} if "attention" in workload.operator else {"torch.compile": _compiled}
    found |= {
        name: provider
        for name, (package, operators) in OTHERS.items()
        if _installed(package) and (provider := operators.get(workload.operator)) and _takes(name, workload)
    }
    return found


def lacking() -> list[str]:
    """The packages of other implementations that are not installed."""
    return sorted({package for package, _ in OTHERS.values() if not _installed(package)})


def _takes(name, workload):
    """FlagAttention's grid is over the query heads, with which it also indexes k and dk: grouped heads are out of bounds."""
    return name != "flag_attn" or workload.options["heads"] == workload.options["kv_heads"]


def _compiled(workload):
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # the backward runs many times over the same saved tensors
    return torch.compile(workload.reference, dynamic=False)


# ----------------------------------------------------------------------------------------------------------- attention


def _sdpa(backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def provider(workload):
        def call(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return workload.reference(q, k, v)

        return call

    return provider


def _flex(workload):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def call(q, k, v):
        s = q.shape[2]
        if workload.options["causal"] and s not in masks:
            masks[s] = create_block_mask(lambda b, h, i, j: i >= j, None, None, s, s, device=q.device)
        return compiled(q, k, v, block_mask=masks.get(s), enable_gqa=q.shape[1] != k.shape[1])

    return call


def _flash_attn(module):
    def provider(workload):
        function = importlib.import_module(module).flash_attn_func

        def call(q, k, v):
            out = function(*(t.transpose(1, 2) for t in (q, k, v)), causal=workload.options["causal"])
            return out[0] if isinstance(out, tuple) else out  # the first versions of FlashAttention 3 return the LSE

        return call

    return provider


def _flag_attn(workload):
    from flag_attn import piecewise_attention

    return lambda q1, k1, q2, k2, v: piecewise_attention(q1, k1, q2, k2, v, workload.options["threshold"], causal=True)


def _te_attention(workload):
    from transformer_engine.pytorch import DotProductAttention

    heads, groups, d = (workload.options[name] for name in ("heads", "kv_heads", "d"))
    mask = "causal" if workload.options["causal"] else "no_mask"
    layer = DotProductAttention(heads, d, num_gqa_groups=groups, qkv_format="bshd", attn_mask_type=mask)
    return lambda q, k, v: layer(*(t.transpose(1, 2) for t in (q, k, v)))


# ----------------------------------------------------------------------------------------------- the smaller operators


def _liger_rms_norm(workload):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6)


def _liger_rope(workload):
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (torch.cat((t, t), -1)[None] for t in workload.options["tables"])

    def call(q, k):
        out = LigerRopeFunction.apply(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), cos, sin)
        return tuple(t.permute(2, 0, 1, 3) for t in out)

    return call


def _liger_swiglu(workload):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda x: LigerSiLUMulFunction.apply(*x.chunk(2, -1))


def _liger_cross_entropy(workload):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def _liger_linear_cross_entropy(workload):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _quack_rms_norm(workload):
    from quack import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=1e-6)


def _quack_cross_entropy(workload):
    from quack import cross_entropy

    return lambda logits, target: cross_entropy(logits, target).mean()


def _te_rms_norm(workload):
    from transformer_engine.pytorch import RMSNorm

    layers = {}

    def call(x, weight):
        if not layers:
            layers[0] = RMSNorm(x.shape[-1], eps=1e-6, dtype=x.dtype, device=x.device)
        return torch.func.functional_call(layers[0], {"weight": weight}, (x,))

    return call


# name: (package, {operator: provider})
OTHERS = {
    "sdpa cudnn": ("torch", {"flash_attention": lambda w: _sdpa("CUDNN_ATTENTION")(w)}),
    "sdpa flash": ("torch", {"flash_attention": lambda w: _sdpa("FLASH_ATTENTION")(w)}),
    "flex": ("torch", {"flash_attention": _flex}),
    "flash-attn": ("flash_attn", {"flash_attention": _flash_attn("flash_attn")}),
    "flash-attn 3": ("flash_attn_interface", {"flash_attention": _flash_attn("flash_attn_interface")}),
    "flag_attn": ("flag_attn", {"piecewise_attention": _flag_attn}),
    "liger": (
        "liger_kernel",
        {
            "rms_norm": _liger_rms_norm,
            "rope": _liger_rope,
            "swiglu": _liger_swiglu,
            "cross_entropy": _liger_cross_entropy,
            "linear_cross_entropy": _liger_linear_cross_entropy,
        },
    ),
    "quack": ("quack", {"rms_norm": _quack_rms_norm, "cross_entropy": _quack_cross_entropy}),
    "transformer engine": ("transformer_engine", {"rms_norm": _te_rms_norm, "flash_attention": _te_attention}),
}
