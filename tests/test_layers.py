"""Who may import whom: read from the source, so that a cycle or a shortcut shows before it hurts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tunemri

PACKAGE = Path(tunemri.__file__).parent
LAYERS: list[set[str]] = [
    {"errors", "cluster", "files", "fourier", "transforms", "masks", "trajectories", "metrics", "solvers"},
    {"nufft"},
    {"regularisers", "losses", "scan", "networks", "cards"},
    {"operators", "formats"},
    {"coils", "simulate"},
    {"methods"},
    {"datasets", "training", "tuning", "evaluation", "landscape"},
    {"adapters", "plots", "report", "console", "demo", "scoring", "texts", "jobs", "cli", "viewer", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Within a row nobody imports a neighbour, but for these: errors serve all, training draws from datasets, a landscape
# is made of the cases of evaluation, and the top row is itself a stair.
NEIGHBOURS = {
    ("training", "datasets"),
    ("landscape", "evaluation"),
    ("report", "plots"),
    ("demo", "plots"),
    ("demo", "report"),
    ("texts", "console"),
    ("jobs", "console"),
    ("jobs", "texts"),
    ("cli", "console"),
    ("cli", "jobs"),
    ("cli", "texts"),
    ("cli", "demo"),
    ("cli", "plots"),
    ("cli", "report"),
    ("cli", "scoring"),
    ("cli", "viewer"),
    ("viewer", "plots"),
    ("methods", "viewer"),  # the one door upward: `model.view(scan)`, opened when it is called
    ("scoring", "plots"),
    ("scoring", "report"),
    ("__main__", "cli"),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room(module: tuple[str, ...]) -> str:
    return module[0] if module else "__init__"


def imports(path: Path) -> list[tuple[tuple[str, ...], int]]:
    """The tunemri modules that a file imports anywhere in it, as path parts below the package, with the line."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    package = here[:-1]  # of a module and of an __init__ alike
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "tunemri", f"{path}:{node.lineno}: import by relative name"
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                assert (node.module or "").split(".")[0] != "tunemri", f"{path}:{node.lineno}: import by relative name"
                continue
            base = package[: len(package) - (node.level - 1)] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            for alias in node.names:
                target = base + (alias.name,)
                is_module = (PACKAGE.joinpath(*target)).is_dir() or PACKAGE.joinpath(*target).with_suffix(
                    ".py"
                ).is_file()
                found.append((target if is_module else base, node.lineno))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    me = room(path.relative_to(PACKAGE).with_suffix("").parts)
    if me == "__init__":
        assert not imports(path), "the table of contents imports nothing: names come on first use"
        return
    assert me in LEVEL, f"{me} has no row in LAYERS: give it one"
    for target, line in imports(path):
        other = room(target)
        if other in (me, "errors", "__init__") or (me, other) in NEIGHBOURS:
            continue
        assert LEVEL[other] < LEVEL[me], (
            f"{path.name}:{line}: {me} (row {LEVEL[me]}) imports {other} (row {LEVEL[other]})"
        )


@pytest.mark.parametrize("folder", ["methods", "formats"])
def test_no_method_and_no_format_knows_another(folder):
    files = [p for p in (PACKAGE / folder).glob("*.py") if p.name not in ("__init__.py", "base.py")]
    assert files
    for path in files:
        for target, line in imports(path):
            if room(target) == folder:
                assert target[1:2] == ("base",), f"{path.name}:{line}: imports its sibling {'.'.join(target)}"


def test_networks_never_see_a_scan():
    for path in (PACKAGE / "networks").glob("*.py"):
        assert not {room(t) for t, _ in imports(path)} & {"scan", "operators"}, path.name


def test_only_fourier_calls_torch_fft():
    for path in SOURCES:
        if path.name != "fourier.py":
            assert "torch.fft" not in path.read_text(encoding="utf-8"), path


def test_every_module_says_what_it_offers():
    for path in SOURCES:
        names = {n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
        assert "__all__" in names or path.name == "__main__.py", f"{path} lacks __all__"
