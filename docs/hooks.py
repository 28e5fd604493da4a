"""What mkdocs adds to the pages: the reference, written from the code, and links that lead out of docs/ as plain text."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flagscale_like import errors
from flagscale_like.cli import app
from flagscale_like.config import RunConfig

OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a file of the repository names the file: the site does not have it."""
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].lstrip('./')}`)", markdown)


# Configuration


def configuration() -> str:
    """Every key of a YAML, with its type, default and meaning, from the classes that read it."""
    lines = [
        "# Configuration",
        "",
        "Every key of a run's YAML. A group is a mapping; `train.steps=100` on the command line sets a key of it. What has",
        "no default must be given. An unknown key is an error that names the file, the line and the nearest known key.",
        "`flagscale-like train X.yaml --print-config` prints all of this with a run's values.",
        "",
        "This page is written from `flagscale_like/config/` and `flagscale_like/arch.py`.",
    ]
    top = {name: info for name, info in RunConfig.model_fields.items() if not _group(info.annotation)}
    lines += ["", "## Top level", "", *_table(RunConfig, top)]
    for name, info in RunConfig.model_fields.items():
        group = _group(info.annotation)
        if group is not None:
            lines += _section(name, group, optional=_is_optional(info.annotation))
    return "\n".join(lines) + "\n"


def _section(name: str, group: type[BaseModel], *, optional: bool) -> list[str]:
    level = "#" * (2 + name.count("."))
    off = " Off where it is left out." if optional else ""
    lines = ["", f"{level} {name}", "", f"{_summary(group)}{off}", "", *_table(group, group.model_fields)]
    for key, info in group.model_fields.items():
        inner = _group(info.annotation)
        if inner is not None:
            lines += _section(f"{name}.{key}", inner, optional=_is_optional(info.annotation))
    return lines


def _table(group: type[BaseModel], fields: dict[str, FieldInfo]) -> list[str]:
    meanings = _meanings(group)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, info in fields.items():
        key = info.alias or name
        cells = (f"`{key}`", f"`{_type(info)}`", _default(info), meanings.get(name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _summary(group: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(group) or "").partition("\n\n")[0].split())


def _meanings(group: type[BaseModel]) -> dict[str, str]:
    """The entries of a docstring's `Attributes:`; an entry may name several keys."""
    found: dict[str, str] = {}
    text = (inspect.getdoc(group) or "").partition("Attributes:\n")[2]
    for entry in re.split(r"\n {4}(?=\S)", "\n" + text):
        names, colon, meaning = entry.partition(": ")
        if colon:
            found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(meaning.split()))
    return found


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group of keys that a field is, if it is one, alone, optional, or in a list."""
    options = [annotation, *typing.get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _is_optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def _type(info: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(m, name)}"
        for m in info.metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(m, name)
    ]
    return " ".join([_name(info.annotation), *limits])


def _name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(a) for a in arguments if a is not type(None))
    if origin in (list, tuple):
        return f"list of {_name(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, str(annotation)
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "*required*"
    value = info.default if info.default is not PydanticUndefined else info.default_factory()
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or value == []:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# Command line


def command_line() -> str:
    """Every command with its arguments and options, from the application itself."""
    root = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        str(root.help),
        "",
        "`flagscale-like COMMAND --help` says the same, with an example. `--install-completion` sets up completion in your",
        "shell, `--show-completion` prints it. `python -m flagscale_like` is the same program.",
    ]
    for name, command in root.commands.items():
        lines += _command(name, command, "##")
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any, level: str) -> list[str]:
    if hasattr(command, "commands"):
        inner = [_command(f"{name} {sub}", c, "###") for sub, c in command.commands.items()]
        return ["", f"{level} {name}", "", str(command.help), *(line for lines in inner for line in lines)]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    usage = " ".join(["flagscale-like", name, *(_metavar(a) for a in arguments), "[OPTIONS]"])
    lines = ["", f"{level} {name}", "", str(command.help), "", "```text", usage, "```"]
    if arguments or options:
        lines += ["", "| | default | |", "|---|---|---|"]
    for p in arguments:
        lines.append(f"| `{_metavar(p)}` | | {_cell(p.help)} |")
    for p in options:
        names = ", ".join(f"`{o}`" for o in [*p.opts, *p.secondary_opts])
        default = "required" if p.required else "" if p.default in (None, False) else f"`{p.default}`"
        lines.append(f"| {names} | {default} | {_cell(p.help)} |")
    if command.epilog:
        lines += ["", command.epilog.replace("Example: ", "Example:\n\n```text\n") + "\n```"]
    return lines


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


# Exit codes


def exit_codes() -> str:
    """The table of flagscale_like/errors.py."""
    rows = [line.strip() for line in (errors.__doc__ or "").splitlines() if line.strip().startswith("|")]
    lines = [
        "# Exit codes",
        "",
        "What a user can mend ends with one line, `error: cause, and the way out`, and a code of its own. A traceback and",
        "code 1 are a bug of ours.",
        "",
        *rows,
        "",
        "0 is success, and also a run that SIGTERM or SIGINT stopped in order. 128 + n: signal n ended a rank, or the",
        "launcher; 137 is SIGKILL, as the kernel sends it when memory runs out.",
        "",
        "`flagscale-like train` ends with the code of the rank that failed first. Under `torchrun`, and so under the scripts",
        "in `launch/`, the code is torchrun's own, 1; the line in the log is the rank's.",
    ]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/configuration.md": configuration,
    "reference/command-line.md": command_line,
    "reference/exit-codes.md": exit_codes,
}
