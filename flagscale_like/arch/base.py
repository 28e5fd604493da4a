"""What all configuration objects are, and how their fields read numbers."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator


class Frozen(BaseModel):
    """A keyword-only, immutable config object. An unknown key, infinity, NaN, and true or false as a number are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Make true and false text where a number belongs, which is refused: pydantic would read 1 and 0.

        YAML also reads `yes` and `on` as true.
        """
        if not isinstance(values, dict):
            return values
        wrong = {
            key: str(value).lower() for key, value in values.items() if isinstance(value, bool) and cls._is_number(key)
        }
        return values | wrong

    @classmethod
    def _is_number(cls, key: str) -> bool:
        if key not in cls.model_fields:
            return False
        annotation = cls.model_fields[key].annotation
        kinds = {annotation, *get_args(annotation)}
        return bool(kinds & {int, float}) and bool not in kinds


def whole_number(value: object) -> int | None:
    """The value as the integer that a field of a configuration reads it as (32, 32.0, "32"); None for others."""
    try:
        return TypeAdapter(int).validate_python(value)
    except ValidationError:
        return None
