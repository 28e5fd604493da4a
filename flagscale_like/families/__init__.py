"""Model families. A new family is one file in this folder and one line in FAMILIES; no other module names a family."""

from __future__ import annotations

from pathlib import Path

from flagscale_like.arch import ModelArch
from flagscale_like.errors import ConversionError
from flagscale_like.families.baichuan import BAICHUAN, BAICHUAN2
from flagscale_like.families.family import Family, Settings
from flagscale_like.families.llama import AQUILA, LLAMA, MISTRAL
from flagscale_like.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, AQUILA, BAICHUAN, BAICHUAN2, QWEN2, QWEN3)
}


def find_family(name: str) -> Family:
    """A family by the name that ModelArch.family gives.

    Raises:
        ConversionError: there is none of this name.
    """
    if name not in FAMILIES:
        raise ConversionError(f"family {name!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def read_config(folder: Path) -> tuple[Family, ModelArch]:
    """Family and architecture of a Hugging Face folder, from its config.json alone.

    Raises:
        ConversionError: the model_type is not known, a key is missing, or the model has a part that ours has not.
    """
    settings = Settings.read(folder)
    model_type, classes = settings.get("model_type"), settings.get("architectures", [])
    found = [f for f in FAMILIES.values() if f.model_type == model_type]
    if not found:
        # Folders written by old code leave model_type out; the class then names the family.
        found = [f for f in FAMILIES.values() if model_type is None and set(classes) & set(f.architectures)]
    if not found:
        known = ", ".join(sorted({f.model_type for f in FAMILIES.values()}))
        raise settings.fail(f"model_type {model_type!r} is not known; known: {known}")
    family = next((f for f in found if f.matches(settings)), found[0])
    known_classes = {name for f in found for name in f.architectures}
    if classes and not set(classes) & known_classes:
        raise settings.fail(f"architectures is {classes!r}, known for {model_type}: {', '.join(sorted(known_classes))}")
    return family, family.read(settings)
