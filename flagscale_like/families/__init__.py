"""Model families. A new family is one file in this folder and one line in FAMILIES, or a package of its own with an entry
point (families.plug_ins). No other module names a family.
"""

from __future__ import annotations

import functools
from pathlib import Path

from flagscale_like.arch import ModelArch
from flagscale_like.errors import ConversionError
from flagscale_like.families.baichuan import BAICHUAN, BAICHUAN2
from flagscale_like.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from flagscale_like.families.family import Family
from flagscale_like.families.llama import AQUILA, LLAMA, MISTRAL
from flagscale_like.families.mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from flagscale_like.families.plug_ins import plug_ins
from flagscale_like.families.qwen import QWEN2, QWEN3
from flagscale_like.families.settings import Settings

DENSE = (LLAMA, MISTRAL, AQUILA, BAICHUAN, BAICHUAN2, QWEN2, QWEN3)
MIXTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3)
FAMILIES: dict[str, Family] = {family.name: family for family in (*DENSE, *MIXTURES)}


@functools.cache
def families() -> dict[str, Family]:
    """Every family by name: FAMILIES, and those of installed packages.

    Raises:
        ConversionError: a package's family cannot be used; see plug_ins().
    """
    return FAMILIES | plug_ins(FAMILIES)


def find_family(name: str) -> Family:
    """A family by the name that ModelArch.family gives.

    Raises:
        ConversionError: there is none of this name.
    """
    known = families()
    if name not in known:
        raise ConversionError(f"family {name!r} is not known; known: {', '.join(known)}")
    return known[name]


def read_config(folder: Path) -> tuple[Family, ModelArch]:
    """Family and architecture of a Hugging Face folder, from its config.json alone.

    Raises:
        ConversionError: the model_type is not known, a key is missing, or the model has a part that ours has not.
    """
    settings = Settings.read(folder)
    model_type, classes = settings.get("model_type"), settings.names("architectures")
    found = [f for f in families().values() if f.model_type == model_type]
    if not found:
        # Folders written by old code leave model_type out; the class then names the family.
        found = [f for f in families().values() if model_type is None and set(classes) & set(f.architectures)]
    if not found:
        known = ", ".join(sorted({f.model_type for f in families().values()}))
        raise settings.fail(f"model_type {model_type!r} is not known; known: {known}")
    family = next((f for f in found if f.matches(settings)), found[0])
    known_classes = {name for f in found for name in (*f.architectures, f.classifier, f.encoder) if name}
    if classes and not set(classes) & known_classes:
        raise settings.fail(f"architectures is {classes!r}, known for {model_type}: {', '.join(sorted(known_classes))}")
    return family, family.read(settings)
