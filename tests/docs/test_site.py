"""The site builds without a warning, its reference has every key and command, and the drawings are the script's."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import typer
from pydantic import BaseModel

from flagscale_like import errors
from flagscale_like.cli import app
from flagscale_like.config import RunConfig
from flagscale_like.errors import UserError, required
from flagscale_like.planner.layout import Layout
from tests.harness import REPOSITORY

DOCS = REPOSITORY / "docs"


def script(name: str) -> ModuleType:
    spec = required(importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py"), "spec")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_builds_strictly_and_can_be_searched(site):
    pages = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert {"quickstart/", "troubleshooting/", "reference/configuration/"} <= {p["location"] for p in pages}
    assert any("global_batch_size" in p["text"] for p in pages if p["location"].startswith("reference/configuration"))
    page = (site / "index.html").read_text()
    assert not re.search(r"""(src|href)="https?://(?!squidfunk)""", page)  # only the theme's own credit leads elsewhere
    assert not list(site.rglob("*.py"))


def groups(model, path=""):
    """Every group of keys, with its dotted name."""
    for name, info in model.model_fields.items():
        for option in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield f"{path}{name}", option
                yield from groups(option, f"{path}{name}.")


def test_the_configuration_reference_has_every_key_and_its_default():
    page = script("hooks").configuration()
    sections = dict(re.findall(r"^#{2,4} (\S+)\n(.*?)(?=^#{2,4} |\Z)", page, re.MULTILINE | re.DOTALL))
    found = dict(groups(RunConfig))
    assert len(found) > 12
    for name, group in found.items():
        assert name in sections, name
        for key, info in group.model_fields.items():
            assert f"| `{info.alias or key}` |" in sections[name], f"{name}.{key}"
    assert "| `lr` | `number > 0` | *required* |" in sections["optimizer"]
    assert "| `schedule` | `cosine or linear or wsd or constant` | `cosine` |" in sections["optimizer"]


def test_a_key_without_a_meaning_fails_the_reference():
    class Group(BaseModel):
        """A group.

        Attributes:
            described: what it does.
        """

        described: int = 0
        forgotten: int = 0

    hooks = script("hooks")
    with pytest.raises(ValueError, match=r"Group\.forgotten: has no meaning"):
        hooks.key_table(Group, Group.model_fields)
    table = hooks.key_table(Group, {"described": Group.model_fields["described"]})
    assert table[2:] == ["| `described` | `integer` | `0` | what it does. |"]


def every_command(command, path="flagscale-like"):
    """(path, command) of the program, its groups and its commands."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{path} {name}")


COMMANDS = dict(every_command(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_ends_with_an_example_of_the_command(path):
    assert COMMANDS[path].epilog.startswith(f"Example: {path}")
    assert COMMANDS[path].help.strip().endswith(".")


def test_the_command_reference_has_every_command_and_option():
    page = script("hooks").command_line()
    for path, command in COMMANDS.items():
        if hasattr(command, "commands"):
            continue
        assert f"{path.removeprefix('flagscale-like ')}\n" in page
        assert f"{path} " in page or f"{path}\n" in page
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden and parameter.name != "help":
                assert f"`{parameter.opts[0]}`" in page


def test_every_exit_code_is_documented_and_its_own():
    page = script("hooks").exit_codes()
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, UserError) and c is not UserError
    ]
    assert len({c.exit_code for c in classes}) == len(classes) > 7
    for found in classes:
        assert re.search(rf"\| {found.exit_code} +\| {found.__name__} ", page), found


def test_the_drawings_are_what_the_script_draws():
    drawings = script("drawings")
    for name, draw in drawings.DRAWINGS.items():
        assert (DOCS / "images" / name).read_text() == draw(), f"run python docs/drawings.py: {name}"


@pytest.mark.parametrize(("pp", "vpp", "m"), [(4, 1, 8), (4, 2, 8), (2, 3, 6), (8, 1, 8), (4, 4, 16)])
def test_the_drawn_schedules_have_the_bubble_that_the_planner_counts(pp, vpp, m):
    assert script("drawings").bubble(pp, vpp, m) == pytest.approx(Layout(pp=pp, vpp=vpp, num_microbatches=m).bubble)


def test_the_shell_completes_commands():
    environment = {**os.environ, "_FLAGSCALE_LIKE_COMPLETE": "complete_bash", "COMP_WORDS": "flagscale-like pre"}
    code = "import flagscale_like.cli as c; c.app(prog_name='flagscale-like')"
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, env={**environment, "COMP_CWORD": "1"}, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert found.stdout.split() == ["preprocess"]
    source = {**os.environ, "_FLAGSCALE_LIKE_COMPLETE": "source_bash"}
    script_ = subprocess.run(command, env=source, cwd=REPOSITORY, capture_output=True, text=True)
    assert "complete -o default -F" in script_.stdout
