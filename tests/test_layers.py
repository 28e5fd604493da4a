"""The house's rules that can be read from the source: imports point down, functions are short."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flagscale_like"

# Lower number, lower layer. Modules of one layer do not import each other, but for those of layer 0.
LAYER = {
    "errors": 0,
    "config": 0,
    "arch": 0,
    "cluster": 0,
    "figures": 0,
    "json_files": 0,
    "run_folder": 0,
    "run_lock": 0,
    "planner": 1,
    "families": 1,
    "runtime": 2,
    "model": 3,
    "data": 3,
    "checkpoint": 4,
    "engine": 5,
    "generation": 6,
    "objectives": 7,
    "training": 8,
    "rehearsal": 9,
    "rl": 10,
    "recipes": 11,
    "cli": 12,
    "__main__": 13,
}
# Where a function may import our own modules: commands load what they need when they run.
LATE_IMPORTS = "cli"


def imported_names(tree: ast.AST) -> list[tuple[int, str, bool]]:
    """(line, dotted name, relative) of every import, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}", node.level > 0) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, False) for alias in node.names]
    return found


def violations(root: Path) -> list[str]:
    """Every import that points up or sideways, is relative, or hides in a function."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        here = parts[0]
        if here == "__init__":
            continue
        tree = ast.parse(path.read_text())
        where = str(path.relative_to(root))
        if here not in LAYER:
            found.append(f"{where}: {here} has no layer; give it one in tests/test_layers.py")
            continue
        for line, name, relative in imported_names(tree):
            head, _, rest = name.partition(".")
            there = rest.split(".")[0]
            if relative:
                found.append(f"{where}:{line}: relative import; write the full name")
            if head != root.name or there == here or there not in LAYER:
                continue
            if LAYER[there] > LAYER[here] or (LAYER[there] == LAYER[here] != 0):
                found.append(f"{where}:{line}: {here} (layer {LAYER[here]}) imports {there} (layer {LAYER[there]})")
        if here != LATE_IMPORTS:
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef):
                    late = [n for n in imported_names(function) if n[1].startswith(root.name + ".")]
                    found += [f"{where}:{line}: {name} is imported inside {function.name}()" for line, name, _ in late]
    return found


def module_cycles(root: Path) -> list[str]:
    """Cycles among modules, each as a chain of names."""
    names = {".".join((root.name, *p.relative_to(root).with_suffix("").parts)): p for p in root.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    edges = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        targets = {t for _, t, _ in imported_names(ast.Module([n for n in tree.body if not _is_typing_only(n)], []))}
        edges[name] = {n for t in targets for n in (t, t.rpartition(".")[0]) if n in names} - {name}
    cycles, done = [], set()

    def visit(name: str, chain: list[str]) -> None:
        if name in chain:
            cycles.append(" -> ".join([*chain[chain.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*chain, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return cycles


def _is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


MAX_LINES, MAX_PARAMETERS = 60, 8


def large_functions(path: Path, root: Path) -> list[str]:
    """Functions over the limits without a reason: a comment behind the line of their `def`."""
    text = path.read_text()
    lines, found = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
        length = node.end_lineno - node.lineno + 1
        if (length > MAX_LINES or count > MAX_PARAMETERS) and "  # " not in lines[node.lineno - 1]:
            where = f"{path.relative_to(root)}:{node.lineno}"
            found.append(
                f"{where}: {node.name} has {length} lines and {count} parameters, and no reason behind its def"
            )
    return found


def test_the_design_notes_list_these_layers():
    layers: dict[int, list[str]] = {}
    for name, level in LAYER.items():
        layers.setdefault(level, []).append(name)
    layers.pop(LAYER["__main__"])
    written = " < ".join(f"`{', '.join(names)}`" for _, names in sorted(layers.items()))
    notes = (PACKAGE.parent / "docs" / "design.md").read_text()
    assert f"{written}. A module imports only" in " ".join(notes.split())


def test_functions_are_short_or_say_why_not():
    paths = sorted(PACKAGE.rglob("*.py"))
    assert [found for path in paths for found in large_functions(path, PACKAGE.parent)] == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(a, b, c, d, e, f, g, h): ...", 0),
        ("def f(self, a, b, c, d, e, f, g, h): ...", 0),
        ("def f(a, b, c, d, e, *, f, g, h, i): ...", 1),
        ("def f(a, b, c, d, e, *, f, g, h, i):  # the signature is torch's\n    ...", 0),
        ("def f():\n" + "    x = 1\n" * 59, 0),
        ("def f():\n" + "    x = 1\n" * 60, 1),
    ],
)
def test_the_check_of_functions_sees(tmp_path, source, count):
    (tmp_path / "x.py").write_text(source)
    assert len(large_functions(tmp_path / "x.py", tmp_path)) == count


def test_the_training_loop_is_at_most_fifty_lines():
    tree = ast.parse((PACKAGE / "training" / "loop.py").read_text())
    (loop,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run_steps"]
    assert loop.end_lineno - loop.lineno + 1 <= 50


def test_imports_point_down():
    assert violations(PACKAGE) == []


def test_there_are_no_cycles():
    assert module_cycles(PACKAGE) == []


def test_the_kernels_import_nothing_of_ours():
    root = PACKAGE.parent / "kernels"
    for path in root.rglob("*.py"):
        names = [name for _, name, _ in imported_names(ast.parse(path.read_text()))]
        assert not [name for name in names if name.startswith("flagscale_like")], path


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("arch.py", "import flagscale_like.training.loop", "arch (layer 0) imports training (layer 8)"),
        ("data/x.py", "from flagscale_like.model import build", "data (layer 3) imports model (layer 3)"),
        ("data/x.py", "from . import build", "relative import"),
        ("data/x.py", "def f():\n    from flagscale_like import arch", "is imported inside f()"),
        ("new.py", "", "has no layer"),
    ],
)
def test_the_check_sees(tmp_path, file, source, complaint):
    path = tmp_path / "flagscale_like" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert any(complaint in found for found in violations(tmp_path / "flagscale_like"))


def test_no_family_is_named_in_model():
    families = {"aquila", "aquila2", "baichuan", "baichuan2", "llama", "qwen", "mistral", "smollm"}
    for path in (PACKAGE / "model").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
            line = getattr(node, "lineno", 0)
            assert not (isinstance(named, str) and named.lower() in families), f"{path}:{line}: {named}"
