"""Quantized weights in config.json: compressed-tensors' pack-quantized format, as `convert quantize` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flagscale_like.errors import ConversionError

if TYPE_CHECKING:
    from flagscale_like.families.settings import Settings

READ_FORMATS = (
    "read are compressed-tensors' pack-quantized INT4 and INT8 weights in groups, with or without zero points, as `convert "
    "quantize` writes them"
)


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized.

    Raises:
        ConversionError: bits other than 4 and 8, or a group size that does not fill whole 32-bit words.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConversionError(f"bits ({self.bits}) must be 4 or 8")
        if self.group_size <= 0 or self.group_size % 8:
            raise ConversionError(f"group_size ({self.group_size}) must be a positive multiple of 8")

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @classmethod
    def of(cls, settings: Settings) -> Scheme | None:
        """That of a folder's config.json; None where its weights are not quantized.

        Raises:
            ConversionError: another method or format; the message names those that are read.
        """
        found = settings.get("quantization_config")
        if found is None:
            return None
        try:
            (group,) = found["config_groups"].values()
            weights = group["weights"]
            given = cls(weights["num_bits"], weights["group_size"], weights["symmetric"])
            expected = given.config()
            same = ("quant_method", "format", "ignore", "kv_cache_scheme")
            known = all(found.get(key) == expected[key] for key in same) and group["targets"] == ["Linear"]
            known = known and not (group.get("input_activations") or group.get("output_activations"))
            known = known and (weights["type"], weights["strategy"]) == ("int", "group") and not weights.get("actorder")
        except (KeyError, ValueError, TypeError, AttributeError, ConversionError):
            known = False
        if not known:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise settings.fail(
                f"quantization_config is of {method!r} in a form that is not read; {READ_FORMATS}; or give the "
                "folder that it was made from"
            )
        return given

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
            "observer": "mse",
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        # transformers' compressed mode expects the zero points unpacked and the library packs them (compressed-tensors 0.20,
        # transformers 5.23): with this key it dequantizes while loading instead, and from_pretrained needs no argument.
        more = {} if self.symmetric else {"dequantize": True}
        return {
            **more,
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }
