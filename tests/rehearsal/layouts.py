"""Configurations whose ranks have to meet: every example, and every layout in the tables of the other tests, made small."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from flagscale_like.config import RunConfig, load_config
from tests.harness import REPOSITORY, tiny_config

PLACES = 16  # of a row, for each part that ranks cut it into
# Tables of other tests, each {name: (ranks, layout or changes, ...)}.
TABLES = (
    ("tests.training.test_layouts", "LAYOUTS", {}),
    ("tests.training.test_layouts", "SHARED_GROUPS", {}),
    ("tests.training.test_contrastive", "LAYOUTS", {"objective": {"kind": "contrastive", "passages": 3}}),
    ("tests.engine.test_objectives", "LAYOUTS", {}),
    ("tests.model.test_fused_loss", "LAYOUTS", {"kernels__linear_cross_entropy": "fused"}),
    ("tests.model.test_lora", "CASES", {"lora": {"rank": 4}}),
    ("tests.model.test_offload", "LAYOUTS", {"offload": {"share": 0.5, "min_tensor_bytes": 256}}),
    ("tests.planner.test_activations", "LAYOUTS", {}),
    ("tests.planner.test_activations", "LAYOUTS_OF_SHARED_GROUPS", {"model__num_query_groups": 2}),
    ("tests.planner.test_lora", "CASES", {"lora": {"rank": 4}}),
    ("tests.planner.test_states", "LAYOUTS", {}),
    ("tests.planner.test_states", "EXPERT_LAYOUTS", {}),
    ("tests.model.test_context_parallel", "LAYOUTS", {}),
    ("tests.model.test_experts", "LAYOUTS", {}),
)
KINDS = ("next token", "conversations", "dpo", "reward", "contrastive")
OBJECTIVES = {
    "conversations": {"data": {"synthetic": "conversations"}},
    "dpo": {"objective": {"kind": "dpo"}},
    "reward": {"objective": {"kind": "reward", "heads": 2}},
    "contrastive": {"objective": {"kind": "contrastive", "passages": 3}},
}
EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48, "shared_ffn_hidden_size": 32}


def in_tables() -> Iterator[tuple[str, dict]]:
    """(table and name, changes of the tiny configuration) of every layout that a test trains on, the first of equal ones."""
    seen = set()
    for module, table, common in TABLES:
        for name, row in getattr(importlib.import_module(module), table).items():
            changes = {**common, **_changes(row)}
            key = json.dumps(changes, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield f"{module.removeprefix('tests.')} {name}", changes


def _changes(row: tuple) -> dict:
    """(ranks, layout), (ranks, changes), (ranks, layout, model), (ranks, experts, layout) or (layout, cases)."""
    found: dict = {}
    parts = [part for part in row if isinstance(part, dict)]
    for part in parts:
        if "count" in part:
            found["model__experts"] = part
        elif any("__" in key or key in ("parallel", "lora", "offload", "objective") for key in part):
            found |= part
        elif part.keys() <= {"num_query_groups", "qk_norm", "qkv_bias", "position"}:
            found |= {f"model__{key}": value for key, value in part.items()}
        else:
            found["parallel"] = part
    if found.get("parallel", {}).get("ep", 1) > 1 and "model__experts" not in found:
        found["model__experts"] = EXPERTS
    return found


def tiny(changes: dict) -> RunConfig:
    """The configuration of tests' tables, with as few layers and rows as its stages allow."""
    return small(tiny_config("unused", **{"checkpoint__interval": 0, **changes}))


def examples() -> dict[str, Path]:
    """Every YAML of examples/, by its name from there on."""
    folder = REPOSITORY / "examples"
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.yaml"))}


def example(path: Path) -> RunConfig:
    """An example as it is.

    The shape of SmolLM2 comes with its weights, which are not here: it is Llama's.
    """
    return load_config(path, (), lambda *_: tiny_config("unused").model.model_dump(mode="json"))


def stated_world(path: Path) -> int | None:
    """The ranks of the command in the YAML's first comments."""
    found = re.search(r"--world-size[= ](\d+)", path.read_text(encoding="utf-8"))
    return int(found[1]) if found else None


def small(config: RunConfig, world: int | None = None, most_chunks: int = 2) -> RunConfig:
    """The same layout and kinds of stages with narrow layers, few of them, short rows and few micro-batches.

    Args:
        world: ranks; as few as the layout has where it is left out.
        most_chunks: of a stage; more are left out.
    """
    par = config.parallel.model_copy(update={"vpp": min(config.parallel.vpp, most_chunks)})
    values = config.model_dump(mode="json")
    world = world or par.smallest_world
    values["parallel"] = par.model_dump(mode="json") | _few_layers(values["model"], par)
    _narrow(values["model"], par.tp)
    dp = max(1, world // par.model_parallel_size)
    rows = dp * max(2, par.pp) if par.pp > 1 else 2 * dp
    length = PLACES * par.tp * par.cp * 2
    values["train"] |= {"micro_batch_size": 1, "global_batch_size": rows, "seq_length": length, "ramp_up": None}
    if values["task"] == "rl":  # rollouts of a quarter of a row, in groups of two
        values["rl"]["rollout"] |= {"samples": 2, "max_new_tokens": length // 4}
        values["train"]["global_batch_size"] = 2 * rows * values["rl"]["minibatches"]
    values["model"]["max_position_embeddings"] = 0 if not values["model"].get("max_position_embeddings") else 4 * length
    return RunConfig.model_validate(values)


def _few_layers(model: dict, par) -> dict:
    first, last = par.first_stage_layers, par.last_stage_layers
    if model.get("experts") and model["experts"].get("dense_layers"):
        model["experts"]["dense_layers"] = 1
    if not (first or last):
        model["num_layers"] = par.pp * par.vpp * (2 if par.pp * par.vpp == 1 else 1)
        return {}
    middle = 2 * par.vpp
    model["num_layers"] = middle * par.pp - bool(first) - bool(last)
    return {"first_stage_layers": middle - 1 if first else None, "last_stage_layers": middle - 1 if last else None}


def _narrow(model: dict, tp: int) -> None:
    heads, groups = model["num_attention_heads"], model.get("num_query_groups") or model["num_attention_heads"]
    share = max(1, heads // (4 * tp)) if groups % tp == 0 and groups >= tp else 1
    while (
        heads % share or groups % share or (heads // share) % tp or ((groups // share) % tp and tp % (groups // share))
    ):
        share -= 1
    model |= {"num_attention_heads": heads // share, "num_query_groups": groups // share}
    model |= {"hidden_size": 8 * heads // share, "head_dim": 8, "ffn_hidden_size": 16 * tp, "vocab_size": 250}
    if model.get("experts"):
        model["experts"]["ffn_hidden_size"] = 16
        if model["experts"].get("shared_ffn_hidden_size"):
            model["experts"]["shared_ffn_hidden_size"] = 16 * tp
