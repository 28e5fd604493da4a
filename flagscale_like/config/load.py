"""Reads a run's YAML file and overrides. Errors name the file, the line and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flagscale_like.config.run import RunConfig
from flagscale_like.errors import ConfigError


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    read_model: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
) -> RunConfig:
    """Read a YAML file, apply overrides, and validate the result.

    Args:
        path: the YAML file.
        overrides: strings `key.path=value`; the value is YAML.
        read_model: reads the group `model` from the checkpoint or Hugging Face folder that the other values name; None if
            they name neither. Keys of `model` and of its groups in the YAML file override the ones it returns.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or has invalid values. The message has one line for each
            error.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a configuration: its brackets are nested too deeply") from None
    if twice := _twice(node):
        raise ConfigError("\n".join(f"{path}:{problem}" for problem in twice))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    found = read_model(values) if read_model else None
    if found is not None and isinstance(values.get("model") or {}, dict):
        # a group of comments alone is read as null
        values["model"] = _merged(found, values.get("model") or {}, groups=("position", "experts", "latent_attention"))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, node, item) for item in error.errors())) from None


def _merged(found: dict[str, Any], given: dict[str, Any], groups: Sequence[str] = ()) -> dict[str, Any]:
    """`found` with the keys of `given` in their places; the groups key by key."""
    inner = {
        name: _merged(found[name], given[name])
        for name in groups
        if isinstance(found.get(name), dict) and isinstance(given.get(name), dict)
    }
    return found | given | inner


def _twice(node: yaml.Node | None) -> list[str]:
    """The keys that a mapping gives twice, of which YAML would keep the last: "LINE: KEY is given twice ..." for each."""
    found = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in lines:
                    found.append(f"{line}: {key.value} is given twice, here and in line {lines[key.value]}: keep one")
                lines.setdefault(key.value, line)
            found += _twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found += _twice(item)
    return found


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as key.path=value, for example train.micro_batch_size=2")
    *parents, leaf = key.split(".")
    here = values
    for parent in parents:
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a group of keys")
    try:
        value, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = "its brackets are nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"override {override[:80]!r}: not a YAML value: {reason}") from None
    if twice := _twice(node):
        raise ConfigError(f"override {override[:80]!r}: line {twice[0]}")
    here[leaf] = value


def _line(node: yaml.Node | None, location: Sequence[str | int]) -> int | None:
    """The line of a key in the composed YAML. None: an override added the key."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                return line if line is not None else None
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _groups_at(location: Sequence[str | int]) -> tuple[list[str | int], type[BaseModel] | None]:
    """`location` as it is written in YAML, and the group at it; None where it is a value.

    pydantic's locations also name the kind of a group, or the type of a value, that has several, behind its own name.
    """
    group: Any = RunConfig
    options: list[type[BaseModel]] = []
    written: list[str | int] = []
    for part in location:
        kind = next((o for o in options if part in _tags(o)), None) if len(options) > 1 else None
        if kind is not None:
            group, options = kind, [kind]
            continue
        if group is None and isinstance(part, str):
            continue
        written.append(part)
        if isinstance(part, int) or group is None:
            continue
        annotation = group.model_fields[part].annotation if part in group.model_fields else None
        found = [annotation, *getattr(annotation, "__args__", ())]
        options = [o for o in found if isinstance(o, type) and issubclass(o, BaseModel)]
        group = options[0] if options else None
    return written, group


def _tags(group: type[BaseModel]) -> tuple[str, ...]:
    """The values of a group's `kind`."""
    return getattr(group.model_fields["kind"].annotation, "__args__", ()) if "kind" in group.model_fields else ()


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """The valid keys of the group at `location`."""
    _, group = _groups_at(location)
    return [field.alias or name for name, field in group.model_fields.items()] if group is not None else []


def _explain(path: Path, node: yaml.Node | None, item: Any) -> str:
    location, (written, _) = item["loc"], _groups_at(item["loc"])
    line = _line(node, written)
    where = f"{path}:{line}" if line else str(path)
    name = ".".join(str(part) for part in written)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _fields_at(location[:-1]), n=1, cutoff=0.5)
        known = ", ".join(_fields_at(location[:-1]))
        message = "unknown key" + (f", did you mean {close[0]!r}?" if close else f"; known keys: {known}")
    elif item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        name, known = f"{name}.kind", item["ctx"].get("expected_tags")
        given = item["ctx"].get("tag")
        message = f"{given!r} is not known: {known}" if given else "required, but not given"
    elif item["type"] == "missing":
        message = "required, but not given"
    elif item["type"] == "model_type" and item["input"] is None:
        message = "is empty: give its keys, or leave it out"
    elif item["type"] != "value_error":
        message += f" (got {item['input']!r})"
    return f"{where}: {name}: {message}" if name else f"{where}: {message}"
