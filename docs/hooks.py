"""mkdocs hooks: they generate the reference pages from the code, and replace links to files outside docs/ by their paths."""

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

from flagscale_like import errors
from flagscale_like.cli import app
from flagscale_like.config import RunConfig

OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs event: add the generated pages to the site."""
    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs event: replace each link to a file outside docs/ by the file's path, because the site does not have the file."""
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].lstrip('./')}`)", markdown)


# Configuration


def configuration() -> str:
    """The page of all configuration keys, with type, default and meaning, from the fields and docstrings of the classes.

    Raises:
        ValueError: a key has no meaning in its class's docstring.
    """
    lines = [
        "# Configuration",
        "",
        "All keys of a run's YAML file. A group is a mapping of keys. On the command line, `train.steps=100` sets the key",
        "`steps` of the group `train`. A required key has no default. An unknown key is an error that names the file, the",
        "line and the nearest known key. `flagscale-like train X.yaml --print-config` prints all keys with a run's values.",
        "",
        "This page is generated from `flagscale_like/config/` and `flagscale_like/arch/`.",
    ]
    top = {name: info for name, info in RunConfig.model_fields.items() if not _groups(info.annotation)}
    lines += ["", "## Top level", "", *key_table(RunConfig, top)]
    for name, info in RunConfig.model_fields.items():
        for group in _groups(info.annotation):
            lines += _section(name, group, info)
    return "\n".join(lines) + "\n"


def _section(name: str, group: type[BaseModel], field: FieldInfo) -> list[str]:
    level = "#" * (2 + name.count("."))
    note = ""
    if typing.get_origin(field.annotation) is list:
        note = " A list; each entry has these keys."
    elif _is_optional(field.annotation):
        note = " Off unless the group is given." if field.default is None else f" `{name}: null` turns it off."
    heading = ["", f"{level} {name}"]
    if len(kinds := _groups(field.annotation)) > 1:  # one heading, and a table for each kind
        kind = typing.get_args(group.model_fields["kind"].annotation)[0]
        heading = [*(heading if group is kinds[0] else []), "", f"With `kind: {kind}`:"]
    lines = [*heading, "", f"{_summary(group)}{note}", "", *key_table(group, group.model_fields)]
    for key, info in group.model_fields.items():
        for inner in _groups(info.annotation):
            lines += _section(f"{name}.{key}", inner, info)
    return lines


def key_table(group: type[BaseModel], fields: dict[str, FieldInfo]) -> list[str]:
    meanings = _meanings(group)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, info in fields.items():
        key = info.alias or name
        if not meanings.get(name):
            raise ValueError(
                f"{group.__name__}.{name}: has no meaning: describe it under `Attributes:` in the docstring"
            )
        cells = (f"`{key}`", f"`{_type(info)}`", _default(info), meanings[name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _summary(group: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(group) or "").partition("\n\n")[0].split())


def _meanings(group: type[BaseModel]) -> dict[str, str]:
    """Each key's meaning, from the `Attributes:` section of the group's docstring. An entry may name several keys."""
    found: dict[str, str] = {}
    text = (inspect.getdoc(group) or "").partition("Attributes:\n")[2]
    for entry in re.split(r"\n {4}(?=\S)", "\n" + text):
        names, colon, meaning = entry.partition(": ")
        if colon:
            found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(meaning.split()))
    return found


def _groups(annotation: Any) -> list[type[BaseModel]]:
    """The groups that a field holds, directly, optionally or in a list; several where its `kind` tells them apart."""
    options = [annotation, *typing.get_args(annotation)]
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]


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
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "the group's defaults"
    if value is None or value == []:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# Command line


def command_line() -> str:
    """The page of all commands with their arguments and options, from the typer application."""
    root = typer.main.get_group(app)
    lines = [
        "# Command line",
        "",
        str(root.help),
        "",
        "`flagscale-like COMMAND --help` prints the same text, with an example. `--install-completion` installs completion",
        "for your shell, `--show-completion` prints it. `python -m flagscale_like` runs the same program.",
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
    """The page of all exit codes, from the docstring of flagscale_like/errors.py."""
    rows = [line.strip() for line in (errors.__doc__ or "").splitlines() if line.strip().startswith("|")]
    lines = [
        "# Exit codes",
        "",
        "An error that the user can fix ends the program with one line, `error: ...`, which says the cause and what to do,",
        "and with the exit code of its class. A traceback with exit code 1 is a bug in flagscale-like.",
        "",
        *rows,
        "",
        "0 is success; a run that saved and stopped after SIGTERM or SIGINT also exits with 0. 128 + n means that signal n",
        "ended a rank or the launcher: 137 is SIGKILL, which the kernel sends when memory runs out.",
        "",
        "`flagscale-like train` and `launch/torchrun.sh` exit with the code of the rank that failed first. `torchrun` itself",
        "exits with 1; its report has the rank's error line.",
    ]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/configuration.md": configuration,
    "reference/command-line.md": command_line,
    "reference/exit-codes.md": exit_codes,
}
