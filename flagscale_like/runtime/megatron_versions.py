"""Which versions of megatron-core are tested, and what of it is used that is not its public interface.

A new version is tried in three steps: add it to VERSIONS, see that `absent()` is empty with it, run the tests. What a version
changes under our feet is mended where the name is used, and noted in the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Version:
    """A version of megatron-core.

    Attributes:
        python: the least Python that its wheels are for.
        tested: what has been run with it.
        differs: what it does otherwise than 0.16.1, as far as it meets our code.
        asks: what a training step asks of torch.cuda, and with it of a chip's namespace, that 0.16.1 does not ask.
    """

    python: str
    tested: str
    differs: str = ""
    asks: frozenset[str] = frozenset()


VERSIONS = {
    "0.16.1": Version("3.10", "all tests, on Python 3.11"),
    "0.17.1": Version(
        "3.12",
        "training steps, latent attention on every layout, a plug-in of the CPU",
        "a layer of experts tells its router whether it predicts several tokens",
    ),
    "0.18.2": Version(
        "3.12", "as 0.17.1", "as 0.17.1; norms of q and k in the spec need a switch in the configuration"
    ),
    "0.19.2": Version(
        "3.12",
        "the tests of layouts, kills, resume, models, engine and runtime, on Python 3.12",
        "as 0.18.2; gives attention a name; the import loads torch's inductor",
        frozenset({"current_stream"}),
    ),
}

# (module, dotted name) -> the file that uses it, and what for
PRIVATE = {
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._get_model_param_range_map"): (
        "engine/shards.py: the flat range of a parameter that this rank owns"
    ),
    ("megatron.core.optimizer.optimizer", "MegatronOptimizer.step_with_ready_grads"): (
        "engine/engine.py: the update, after the loop has judged the step"
    ),
    ("megatron.core.optimizer.optimizer", "MegatronOptimizer.prepare_grads"): (
        "engine/engine.py: gradients into the fp32 masters, and the fp16 overflow"
    ),
    (
        "megatron.core.optimizer.optimizer",
        "ChainedOptimizer",
    ): "engine/shards.py: chained_optimizers, one a kind of parameter",
    ("megatron.core.optimizer.optimizer_config", "ParamWithNamePredicate"): (
        "engine/optimizer.py: learning rates of muP and LoRA+"
    ),
    ("megatron.core.distributed", "DistributedDataParallel.disable_forward_pre_hook"): (
        "engine/engine.py: whole parameters while the model is evaluated"
    ),
    (
        "megatron.core.transformer.moe.router",
        "TopKRouter.routing",
    ): "model/experts.py: our own auxiliary losses in its place",
    (
        "megatron.core.transformer.moe.moe_utils",
        "topk_routing_with_score_function",
    ): "model/experts.py: the choice of experts",
    ("megatron.core.transformer.moe.moe_utils", "compute_routing_scores_for_aux_loss"): (
        "model/experts.py: the scores that the auxiliary loss is of"
    ),
    (
        "megatron.core.transformer.moe.moe_utils",
        "MoEAuxLossAutoScaler",
    ): "model/experts.py: adds a loss in the middle of a model",
    ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"): (
        "runtime/device_shim.py: sizes of an all-to-all on a device that is not CUDA"
    ),
    ("megatron.core.pipeline_parallel.p2p_communication", "P2PCommunicator._communicate"): (
        "runtime/device_shim.py: sends that gloo reads late"
    ),
    ("megatron.core.distributed.param_and_grad_buffer", "dist_reduce_scatter_func"): (
        "runtime/device_shim.py: collectives of one rank with itself"
    ),
    ("megatron.core.distributed.param_and_grad_buffer", "dist_all_gather_func"): "runtime/device_shim.py: the same",
    (
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
    ): "runtime/device_shim.py: random state for recompute",
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"): "runtime/device_shim.py: the same",
    ("megatron.core.tensor_parallel.layers", "_grad_accum_fusion_available"): (
        "runtime/device_shim.py: weight gradients into main_grad"
    ),
    ("megatron.core.transformer.module", "_FLOAT_TYPES"): "runtime/device_shim.py: tensors are told by their dtype",
    ("megatron.core.transformer.utils", "set_model_to_sequence_parallel"): (
        "generation/forward.py: decoding without sequence parallelism"
    ),
    ("megatron.core.jit", "disable_jit_fuser"): "runtime/device_shim.py: fusions as plain functions",
}


def installed() -> str:
    """The version of megatron-core."""
    return version("megatron-core")


def note() -> str:
    """What to know of the installed version, for a line of `doctor`."""
    found = VERSIONS.get(installed())
    if found is None:
        return f"{installed()}, not tested: use one of {', '.join(VERSIONS)}"
    return f"{installed()}, tested: {found.tested}"


def absent(names: Mapping[tuple[str, str], str] = PRIVATE) -> list[str]:
    """Those of `names`, a table such as PRIVATE, that the installed version lacks. Imports much of megatron-core."""
    return [f"{module}.{name} ({why})" for (module, name), why in names.items() if not _there(module, name)]


def _there(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
