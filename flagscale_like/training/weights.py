"""What a run's weights are loaded from: its own checkpoint, another one, a Hugging Face folder; a base and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flagscale_like.checkpoint.adapters import AdaptedWeights, Base, holds_adapters, identify, lora_of, open_base
from flagscale_like.checkpoint.companions import Origin
from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.manifest import COMPANIONS, find_checkpoint
from flagscale_like.checkpoint.store import WeightSource, verify
from flagscale_like.config import Checkpoint, Lora, RunConfig
from flagscale_like.config.lora import NO_BASE
from flagscale_like.errors import CheckpointError, ConfigError
from flagscale_like.families.features import EXPERTS_NOT_EXPRESSED
from flagscale_like.runtime.parallel import ParallelContext

# Options of the adapters that decide what a checkpoint's adapters compute. The others may change on resume.
FIXED = ("rank", "alpha", "targets", "rslora", "dora")


def weights_to_load(config: RunConfig, reader: CheckpointReader | None, ctx: ParallelContext) -> WeightSource | None:
    """The source of a run's weights; None where they are drawn, or are shapes alone. All ranks call it.

    Args:
        reader: the run's own newest checkpoint, if it has one.

    Raises:
        ConfigError: a new run with LoRA has no weights to begin with.
        CheckpointError, ConversionError: a source is not there, cannot be read, or does not belong to the others.
    """
    source = reader or open_weights(config.checkpoint, ctx)
    if config.lora is None:
        if source is not None and holds_adapters(source):
            raise CheckpointError(
                f"{source.folder}: holds LoRA adapters: give the group lora to train them, or merge them into their base "
                "with `convert export --merge`"
            )
        return source
    if source is None and not ctx.platform.holds_data:
        return None
    if source is None:
        raise ConfigError(NO_BASE)
    if not isinstance(source, CheckpointReader) or not holds_adapters(source):
        if reader is not None:
            raise CheckpointError(
                f"{source.folder}: was saved without lora: go on without it, or begin a new run from it with "
                f"checkpoint.load"
            )
        return source
    _check_options(source, config.lora)
    named = Path(config.lora.base) if config.lora.base else _renamed(config, source)
    base = open_base(
        source, named, way_out="name its folder with lora.base", identity=lambda base: identify_once(base, ctx)
    )
    if config.checkpoint.load_strict:
        check_model(config, base, resuming=False)
    return AdaptedWeights(base, source)


def origin_of(source: WeightSource | None) -> Origin:
    """The Hugging Face folder that weights come from, if they do."""
    if source is None:
        return Origin()
    return source.origin()


def usage_folders(config: RunConfig, reader: CheckpointReader | None, source: WeightSource | None) -> list[Path | None]:
    """Where a run's tokenizer and generation settings may lie, the first choice first."""
    named = Path(config.data.tokenizer) if config.data.tokenizer else None
    given = source.base if isinstance(source, AdaptedWeights) else source
    beside = [origin for origin in (reader, given) if origin is not None]
    return [named, *(o.folder / COMPANIONS if isinstance(o, CheckpointReader) else o.folder for o in beside)]


def identify_once(base: Base, ctx: ParallelContext) -> dict:
    """identify(), whose reading rank 0 does for all."""
    return ctx.from_main(lambda: identify(base))


def _check_options(adapters: CheckpointReader, wanted: Lora) -> None:
    saved = lora_of(adapters)
    different = [
        f"lora.{name}: {getattr(saved, name)!r} saved, {getattr(wanted, name)!r} configured"
        for name in FIXED
        if getattr(saved, name) != getattr(wanted, name)
    ]
    if different:
        raise CheckpointError(f"{adapters.folder}: has other adapters: {'; '.join(different)}")


def _renamed(config: RunConfig, adapters: CheckpointReader) -> Path | None:
    """The base that the configuration names now, where it named another when the checkpoint was saved."""
    saved = adapters.state.get("config", {}).get("checkpoint", {})
    for name in ("init_from_hf", "load"):
        now = getattr(config.checkpoint, name)
        if now and saved and now != saved.get(name) and not _is_at(Path(now), adapters):
            return Path(now)
    return None


def _is_at(path: Path, adapters: CheckpointReader) -> bool:
    """Whether a path of checkpoint.load is that of the adapters themselves."""
    return adapters.folder.absolute().is_relative_to(path.absolute())


def open_weights(options: Checkpoint, ctx: ParallelContext) -> WeightSource | None:
    """What a new run's weights come from: `load`'s checkpoint, whole, or `init_from_hf`'s folder; None draws them.

    Raises:
        CheckpointError, ConversionError: it is not there, cannot be read, or is damaged.
    """
    if options.init_from_hf:
        return HfFolder(Path(options.init_from_hf))
    if not options.load:
        return None
    folder = find_checkpoint(Path(options.load))
    if problems := verify(folder, ctx):
        raise CheckpointError(f"{folder}: is not whole: {problems[0]}")
    return CheckpointReader(folder)


def check_model(config: RunConfig, source: WeightSource, *, resuming: bool) -> list[str]:
    """Refuse weights of another architecture, naming what differs.

    A new run may read the weights with other positions than they were trained with (a scaling of RoPE, another base, NLPE),
    or with attention in both directions, because these hold no weights. A run that goes on may not.

    Returns:
        What differs and is allowed, to tell the user.

    Raises:
        CheckpointError: a field of the model differs.
    """
    free = {"family", "init_std", "output_init_std", "norm_init", "max_position_embeddings"}
    _check_experts(config, source)
    saved, wanted = source.arch.model_dump(mode="json"), config.model.model_dump(mode="json")
    training = _take_training_options(saved, wanted)
    before, after = saved["position"], wanted["position"]
    if not resuming:
        free |= {"attention", *(() if "alibi" in (before["kind"], after["kind"]) else ("position",))}
    different = [
        f"model.{key}: {saved.get(key)!r} saved, {value!r} configured"
        for key, value in wanted.items()
        if key not in free and saved.get(key) != value
    ]
    if different:
        raise CheckpointError(f"{source.folder}: is of another model: {'; '.join(different)}")
    attention = saved["attention"], wanted["attention"]
    changes = [("attention", *attention), *((f"position.{key}", before[key], value) for key, value in after.items())]
    changes += [] if resuming else training  # a run that goes on names what its configuration changes
    return [
        f"model.{key} is {value!r} from here on; the weights were trained with {trained!r}"
        for key, trained, value in changes
        if trained != value
    ]


def _check_experts(config: RunConfig, source: WeightSource) -> None:
    """Refuse a dense model's weights for a mixture of experts, and the other way round, with what to do.

    Raises:
        CheckpointError: one has experts and the other has not.
    """
    saved, wanted = source.arch.experts, config.model.experts
    if saved is None and wanted is not None:
        raise CheckpointError(
            f"{source.folder}: is of a dense model, and model.experts asks for experts: make them with `flagscale-like "
            f"convert upcycle --experts {wanted.count} --top-k {wanted.top_k}`, or leave model.experts out"
        )
    if saved is not None and wanted is None:
        raise CheckpointError(
            f"{source.folder}: is of a mixture of {saved.count} experts, and the configuration of a dense model: leave out "
            "the group model, or give the checkpoint's model.experts"
        )


def _take_training_options(saved: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Take out of both what of model.experts is no part of the model: how training evens out the load.

    Returns:
        of each: its key in the group model, the saved value, and the configured one.
    """
    if not (saved.get("experts") and wanted.get("experts")):
        return []
    return [
        (f"experts.{name}", saved["experts"].pop(name), wanted["experts"].pop(name)) for name in EXPERTS_NOT_EXPRESSED
    ]
