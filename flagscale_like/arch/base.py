"""What all configuration objects are, and how their fields read numbers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


class Frozen(BaseModel):
    """A keyword-only, immutable config object; an unknown key, infinity or NaN is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def whole_number(value: object) -> int | None:
    """The value as the integer that a field of a configuration reads it as (32, 32.0, "32"); None for others."""
    try:
        return TypeAdapter(int).validate_python(value)
    except ValidationError:
        return None
