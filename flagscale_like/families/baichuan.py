"""Baichuan-7B (RoPE), Baichuan-13B (ALiBi), Baichuan2-7B and 13B (NormHead). q, k and v are one matrix, W_pack.

The published config.json files do not name the model. 13B has `model_max_length` alone, 7B has `max_position_embeddings` too.
The class is `BaiChuanForCausalLM` for the first 7B and `BaichuanForCausalLM` for the other three, so that it tells the two
7B apart. Version 2 has `z_loss_weight`, and another vocabulary, which tells as long as no tokens were added. An export also
has the keys `position_embedding` and `norm_head`; where they are present, they decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_like.arch import ModelArch, Position
from flagscale_like.families.family import Family
from flagscale_like.families.settings import Settings, common_config, rope_config
from flagscale_like.families.weight_map import PackedQKV, Rule, Shape

VOCABULARIES = {64_000: False, 125_696: True}  # whether it is version 2's


def _is_second(settings: Settings) -> bool:
    """Whether it is version 2, which has a NormHead.

    Raises:
        ConversionError: nothing in the file tells: a model without its NormHead computes other logits.
    """
    if settings.get("norm_head") is not None:
        return bool(settings.get("norm_head"))
    if "z_loss_weight" in settings.values:
        return True
    classes = settings.names("architectures")
    if "BaiChuanForCausalLM" in classes:
        return False
    if "BaichuanForCausalLM" in classes and settings.get("max_position_embeddings") is not None:
        return True
    vocabulary = settings.get("vocab_size")
    if vocabulary not in VOCABULARIES:
        raise settings.fail(
            f"does not say whether this is Baichuan or Baichuan2 (vocab_size is {vocabulary!r}, published are 64000 and "
            '125696): add "norm_head": false for Baichuan, true for Baichuan2'
        )
    return VOCABULARIES[vocabulary]


def _read(name: str, settings: Settings) -> ModelArch:
    settings.require("position_embedding", "rope", "alibi")
    published = "rope" if settings.get("max_position_embeddings") is not None else "alibi"
    if settings.get("position_embedding", published) == "rope":
        position = settings.rope()
        if position.scaling is not None:
            raise settings.fail(
                f"rope_scaling is {position.scaling.kind!r}, which the published code of {name} has not"
            )
    else:
        settings.number("model_max_length")
        position = Position(kind="alibi")
    return settings.arch(name, position=position, norm_head=name == "baichuan2")


def _write(arch: ModelArch) -> dict[str, Any]:
    length = arch.max_position_embeddings or 4096
    rope = rope_config(arch) if arch.position.kind == "rope" else {}
    return {
        **common_config(arch),
        **rope,
        "model_max_length": length,
        "position_embedding": arch.position.kind,
        "norm_head": arch.norm_head,
    }


def _write_first(arch: ModelArch) -> dict[str, Any]:
    # The two sizes' code is in classes whose names differ in one capital letter.
    name = "BaiChuanForCausalLM" if arch.position.kind == "rope" else "BaichuanForCausalLM"
    return {**_write(arch), "architectures": [name]}


def _w_pack(core: str, hf: str, shapes: Mapping[str, Shape]) -> list[Rule]:
    name = core + "linear_qkv.weight"
    return [PackedQKV(name, shapes[name], (hf + "W_pack.weight",))]


BAICHUAN = Family(
    name="baichuan",
    model_type="baichuan",
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    supports=frozenset({"rope", "alibi"}),
    matches=lambda settings: not _is_second(settings),
    read=lambda settings: _read("baichuan", settings),
    write=_write_first,
    qkv=_w_pack,
)

BAICHUAN2 = Family(
    name="baichuan2",
    model_type="baichuan",
    architectures=("BaichuanForCausalLM",),
    supports=frozenset({"rope", "alibi", "norm_head"}),
    needs=frozenset({"norm_head"}),
    matches=_is_second,
    read=lambda settings: _read("baichuan2", settings),
    write=_write,
    qkv=_w_pack,
)
