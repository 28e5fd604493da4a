"""config.json of a Hugging Face folder: its values as ModelArch, and what all families write alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flagscale_like.arch import SCALING_FIELDS, ModelArch, Position, RopeScaling
from flagscale_like.errors import ConversionError
from flagscale_like.families.quantization import Scheme
from flagscale_like.json_files import BAD_JSON


class Settings:
    """The values of a config.json. A missing key or one of another type is an error that names the file.

    Args:
        source: the file's name in messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """config.json of a Hugging Face folder.

        Raises:
            ConversionError: it is missing or is no JSON object.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConversionError(
                f"{folder}: not a Hugging Face folder: config.json: {error.strerror or error}"
            ) from None
        except BAD_JSON as error:
            raise ConversionError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConversionError(f"{path}: must be a JSON object, found {type(values).__name__}")
        return cls(values, str(path))

    def fail(self, message: str) -> ConversionError:
        return ConversionError(f"{self.source}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, kind: type = int, default: Any = None, *, zero: bool = False) -> Any:
        """A positive number, or with `zero` one that may be 0.

        Raises:
            ConversionError: missing without a default, or something else.
        """
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"has no {key}")
        wanted = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, wanted) or value < 0 or (value == 0 and not zero):
            least = "a positive" if not zero else "0 or a positive"
            raise self.fail(f"{key} is {value!r}, must be {least} {'number' if kind is float else 'integer'}")
        return kind(value)

    def names(self, key: str) -> list[str]:
        """A list of names; empty where the key is missing or null.

        Raises:
            ConversionError: something else.
        """
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.fail(f"{key} is {value!r}, must be a list of names")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Check that a key is missing, null or has one of the allowed values.

        Raises:
            ConversionError: it has another value, which the native model does not compute.
        """
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.fail(f"{key} is {value!r}, supported: {', '.join(map(repr, allowed)) or 'null'}")

    def rope(self, base: float = 10000.0) -> Position:
        """RoPE from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which replaces both since transformers 5.

        Args:
            base: where neither gives rope_theta.

        Raises:
            ConversionError: a scaling that the native model does not compute.
        """
        parameters: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            found = self.get(key, {})
            if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
                raise self.fail(f"{key} is {found!r}, supported: one set of numbers for all layers")
            parameters |= found
        base = parameters.get("rope_theta") or self.number("rope_theta", float, base)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        partial = parameters.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise self.fail(f"partial_rotary_factor is {partial!r}, supported: 1.0")
        scaling = None if kind == "default" else self._scaling(kind, parameters)
        try:
            return Position(base=base, scaling=scaling)
        except ValidationError as error:
            raise self.fail(f"rope_theta: {_first_message(error)}") from None

    def _scaling(self, kind: str, parameters: dict[str, Any]) -> RopeScaling | None:
        """What is missing has the defaults of transformers' modeling_rope_utils."""
        if kind not in tuple(SCALING_FIELDS):
            raise self.fail(f"rope_scaling is {kind!r}, supported: {', '.join(SCALING_FIELDS)}")
        given = {name: parameters[name] for name in SCALING_FIELDS[kind] if parameters.get(name) is not None}
        if kind != "linear":
            before = self.get("original_max_position_embeddings", parameters.get("original_max_position_embeddings"))
            if before is None and kind != "llama3":
                before = self.number("max_position_embeddings")
            if before is not None:
                given["original_max_position_embeddings"] = before
            if kind == "dynamic" and before != self.number("max_position_embeddings"):
                raise self.fail(
                    f"rope_scaling of type dynamic has original_max_position_embeddings {before}, for which transformers "
                    f"takes max_position_embeddings ({self.get('max_position_embeddings')}): let them be equal"
                )
        if kind == "yarn":
            if "factor" not in given and isinstance(before, int) and before > 0:
                given["factor"] = self.number("max_position_embeddings") / before
            given = {k: v for k, v in given.items() if v != 0 or k not in ("beta_fast", "beta_slow")}
            given["truncate"] = bool(parameters.get("truncate", True))
        required = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        missing = [name for name in required if name in SCALING_FIELDS[kind] and name not in given]
        if missing:
            raise self.fail(f"rope_scaling of type {kind} has no {', '.join(sorted(missing))}")
        try:
            scaling = RopeScaling.model_validate({"kind": kind, **given})
        except ValidationError as error:
            raise self.fail(f"rope_scaling: {_first_message(error)}") from None
        return None if kind == "linear" and scaling.factor == 1 else scaling

    def arch(self, family: str, **more: Any) -> ModelArch:
        """ModelArch from the keys that all families share, and the fields in `more`.

        Raises:
            ConversionError: a key is missing, or the numbers do not fit each other.
        """
        self.require("hidden_act", "silu", "swish")
        Scheme.of(self)
        values: dict[str, Any] = {
            "num_layers": self.number("num_hidden_layers"),
            "hidden_size": self.number("hidden_size"),
            "num_attention_heads": self.number("num_attention_heads"),
            "ffn_hidden_size": self.number("intermediate_size"),
            "vocab_size": self.number("vocab_size"),
            "norm_eps": self.number("rms_norm_eps", float),
            "init_std": self.number("initializer_range", float, 0.02),
            "tie_embeddings": bool(self.get("tie_word_embeddings", False)),
            "max_position_embeddings": self.number(
                "max_position_embeddings", default=self.get("model_max_length", 2048)
            ),
            "family": family,
        }
        if self.get("num_key_value_heads") is not None:
            values["num_query_groups"] = self.number("num_key_value_heads")
        if self.get("is_causal", True) is False:
            values["attention"] = "bidirectional"
        if self.get("head_dim") is not None:
            values["head_dim"] = self.number("head_dim")
        try:
            return ModelArch.model_validate(values | more)
        except ValidationError as error:
            raise self.fail(_first_message(error)) from None


def _first_message(error: ValidationError) -> str:
    item = error.errors()[0]
    where = ".".join(map(str, item["loc"]))
    return (f"{where}: " if where else "") + item["msg"].removeprefix("Value error, ")


def common_config(arch: ModelArch) -> dict[str, Any]:
    """The keys of config.json that are the same in all families.

    transformers 5 computes bidirectional attention where is_causal is false; earlier versions do not read it.
    """
    return {
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "vocab_size": arch.vocab_size,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "hidden_act": "silu",
        "initializer_range": arch.init_std,
        "use_cache": True,
        **({"is_causal": False} if arch.attention == "bidirectional" else {}),
    }


def rope_config(arch: ModelArch, *, type_key: str = "rope_type") -> dict[str, Any]:
    """RoPE's keys of config.json: those of transformers 5 (rope_parameters), and those of transformers 4 and others.

    Args:
        type_key: the name of the kind in `rope_scaling`.

    Raises:
        ConversionError: dynamic scaling starts at another length than max_position_embeddings.
    """
    scaling = arch.position.scaling
    kind = scaling.kind if scaling else "default"
    length, numbers = arch.max_position_embeddings or 2048, {}
    if scaling is not None:
        fields = RopeScaling.model_fields
        optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
        numbers = {k: v for k, v in scaling.numbers.items() if k not in optional or v != fields[k].default}
        before = numbers.get("original_max_position_embeddings")
        if before and not arch.max_position_embeddings:
            length = before if kind == "dynamic" else round(before * scaling.factor)
        if kind == "dynamic" and length != numbers.pop("original_max_position_embeddings"):
            raise ConversionError(
                f"model.position.scaling is dynamic from original_max_position_embeddings ({before}) on, which a config.json "
                f"takes from max_position_embeddings ({length}): set model.max_position_embeddings to {before}"
            )
    return {
        "max_position_embeddings": length,
        "rope_theta": arch.position.base,
        "rope_scaling": {type_key: kind, **numbers} if scaling else None,
        "rope_parameters": {"rope_type": kind, "rope_theta": arch.position.base, **numbers},
    }
