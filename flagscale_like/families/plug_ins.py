"""Families of other packages, found by the entry points of one group."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from flagscale_like.errors import ConversionError
from flagscale_like.families.family import Family

GROUP = "flagscale_like.families"


def plug_ins(built_in: Mapping[str, Family]) -> dict[str, Family]:
    """The families of installed packages, by name.

    Args:
        built_in: our own, by name.

    Raises:
        ConversionError: a package cannot be imported, gives no Family, or takes a name or a model_type that is taken.
    """
    found: dict[str, Family] = {}
    origins: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        other = origins.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ConversionError(
                f"{_origin(other)} and {_origin(entry)} both give a family named {entry.name}: uninstall one"
            )
        family = _load(entry)
        if family.name in built_in:
            raise ConversionError(f"{_origin(entry)} gives a family named {family.name}, which is built in: rename it")
        # Families of one package may share a model_type, and tell their folders apart by `matches`.
        others = [f for f in (*built_in.values(), *found.values()) if f.model_type == family.model_type]
        owner = next((f.name for f in others if f.name in built_in or _origin(origins[f.name]) != _origin(entry)), None)
        if owner is not None:
            raise ConversionError(
                f"{_origin(entry)} gives the family {family.name} the model_type {family.model_type!r}, which is that of "
                f"{owner}: choose another"
            )
        found[family.name] = family
    return found


def _load(entry: EntryPoint) -> Family:
    try:
        family = entry.load()
    except Exception as error:  # whatever a package raises while it is imported
        reason = (str(error).splitlines() or ["without a message"])[0]
        raise ConversionError(
            f"{_origin(entry)} cannot be imported ({type(error).__name__}: {reason}): mend or uninstall it"
        ) from error
    if not isinstance(family, Family):
        raise ConversionError(f"{_origin(entry)}: {entry.value} is no Family")
    if family.name != entry.name:
        raise ConversionError(
            f"{_origin(entry)}: {entry.value} is named {family.name!r}, its entry point {entry.name!r}"
        )
    return family


def _origin(entry: EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist is not None else f"entry point {entry.value}"
