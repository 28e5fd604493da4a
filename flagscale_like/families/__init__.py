"""Model families: the only place that knows their names. A family maps Hugging Face tensors to megatron-core's."""

from __future__ import annotations

from types import ModuleType

from flagscale_like.errors import ConversionError
from flagscale_like.families import llama

FAMILIES: dict[str, ModuleType] = {"llama": llama}


def find_family(name: str) -> ModuleType:
    """The module of a family: `rules(arch)` and `hf_config(arch)`.

    Raises:
        ConversionError: there is none of this name.
    """
    if name not in FAMILIES:
        raise ConversionError(f"family {name!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
