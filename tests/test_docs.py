"""What the pages say is so: Python blocks run, commands parse, links lead somewhere, lists are complete."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

import tunemri
from tunemri import errors, methods
from tunemri.cli import _spread_lists, app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [
        body
        for language, body in re.findall(r"^```(\w*)(?: run[^\n]*)?\n(.*?)^```$", text, re.M | re.S)
        if language in languages
    ]


def commands() -> list[str]:
    lines = "\n".join(b for page in PAGES for b in blocks(page, "", "console", "bash", "sh")).replace("\\\n", " ")
    return [line.strip().removeprefix("$ ") for line in lines.splitlines() if re.match(r"\s*(\$ )?tunemri\s", line)]


@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "python"), ids=lambda c: c.splitlines()[-1][:40])
def test_python_of_the_readme_runs(code, tmp_path):
    if '"hyper-brain"' in code:
        assert "hyper-brain" in methods.bundled(), "the README loads a model that does not ship"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line, said in zip(re.findall(r"^print.*# (.+)$", code, re.M), done.stdout.splitlines(), strict=True):
        assert said == line


def test_there_are_commands_to_check():
    assert len(commands()) >= 10


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_parse(line):
    """Options, their values and arguments are what the command takes; nothing is run."""
    words = _spread_lists(shlex.split(line, comments=True)[1:])
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(
        group.make_context("tunemri", list(words), resilient_parsing=True), words
    )
    assert command is not None
    command.make_context(name, rest)


def test_every_command_is_in_the_readme():
    shown = {line.split()[1] for line in commands()}
    assert {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        if not re.match(r"https?:", target):
            # Each module has a page on the site, and none here.
            source = re.sub(r"^(?:\.\./)*reference/modules/(\w+)\.md$", r"src/tunemri/\1", target)
            there = [page.parent / target, ROOT / source, ROOT / f"{source}.py"]
            assert any(path.exists() for path in there), f"{page.name}: {target}"


def test_the_tree_of_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("```\nsrc/tunemri/") :].split("```")[1]
    package = ROOT / "src/tunemri"
    for path in package.iterdir():
        entries = path.suffix == ".py" and path.name != "__main__.py"
        folder = path.is_dir() and any(p.suffix != ".pyc" for p in path.rglob("*") if p.is_file())
        if entries or folder:
            name = path.name + ("/" if path.is_dir() else "")
            assert re.search(rf"(^|\s){re.escape(name)}\s", tree), f"{name} is not in the README's tree"
    for name in re.findall(r"(?:^|\s)(\w+(?:\.py|/))(?=\s)", tree.split("tests/")[0].split("\n", 1)[1]):
        assert (package / name).exists(), f"the README's tree has {name}, the package has not"


def test_every_file_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`((?:tests|src/tunemri|recipes|docs)/[\w./]+)`", text)):
        assert (ROOT / name).exists(), name


def test_nothing_of_this_machine_and_nothing_unfinished():
    marks = re.compile(r"/work/|/root/|/tmp/|TO" r"DO|FIX" r"ME")
    for folder in ("src", "recipes", "docs", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".toml"):
                found = marks.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path}: {found.group()}"


# ------------------------------------------------------------------------------------------------ the site


def site(name: str) -> ModuleType:
    """A module of docs/_site; neither of these two needs MkDocs."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / f"docs/_site/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute, declared = site("execute"), site("declared")


def test_what_runs_in_the_build_is_python():
    """Whether it works is seen by `make docs`."""
    code = [found for page in PAGES for found in execute.BLOCK.finditer(page.read_text(encoding="utf-8"))]
    assert len(code) > 20
    for found in code:
        if found["language"] == "python":
            assert ast.parse(found["code"]).body


def shown(page: str) -> str:
    return execute.run_page(page, lambda png: f"{png.decode()}.png")


def test_a_block_shows_what_it_gave():
    text = shown(
        """
```python run
x = 3
print("three")
x + 1
```
```console run
$ tunemri --version
$ tunemri masks poison  # exit 2
```
```python run A square
class Square:
    def png(self, dpi):
        return b"square"
Square()
```
```python
never_run
```
"""
    )
    assert "```{.text .output}\nthree\n4\n```" in text
    assert "$ tunemri --version\ntunemri 0." in text
    assert "# exit 2\nerror[bad_option]: " in text
    assert "did you mean 'poisson'" in text
    assert "![A square](square.png)" in text
    assert " run" not in text


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "1 / 0"),
        ("python", "import warnings; warnings.warn('old')"),
        ("python", "import types; types.SimpleNamespace(png=lambda dpi: b'')"),  # a picture without words
        ("console", "$ tunemri masks poison"),
        ("console", "$ tunemri --version  # exit 2"),
        ("console", "$ ls"),
    ],
)
def test_a_block_that_fails_stops_the_build(language, code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest's own filter would do the work
        with pytest.raises(execute.Failed, match=re.escape(code.split()[-1])):
            shown(f"```{language} run\n{code}\n```\n")


def test_blocks_leave_nothing_behind():
    here, before = Path.cwd(), (sys.argv, warnings.showwarning)
    shown("```python run\nopen('x', 'w').close()\n```\n```console run\n$ tunemri masks\n```\n")
    assert Path.cwd() == here
    assert not Path("x").exists()
    assert (sys.argv, warnings.showwarning) == before


def test_every_mark_is_filled_and_every_table_used():
    marks = {found[1] for page in PAGES for found in declared.MARK.finditer(page.read_text(encoding="utf-8"))}
    assert marks == set(declared.GENERATED)


def test_the_table_of_dials_has_every_dial():
    table = declared.dials()
    names = [name for name in methods.METHODS if not methods.needs_weights(name)] + list(methods.bundled())
    for name in names:
        for dial, about in methods.load(name).dials.items():
            (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` | `{dial}` |")]
            ends = about.choices or (f"{about.lo:g} … {about.hi:g}", about.low, about.high)
            assert all(word in row.replace("\\", "") for word in ends), row


def test_the_reference_has_every_command_and_option():
    text = declared.commands()
    for name, command in typer.main.get_command(app).commands.items():
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert parameter.name == "help" or parameter.param_type_name == "argument" or parameter.opts[0] in section


def test_the_reference_has_every_error():
    kinds = {(kind.word, str(kind.exit_code)) for kind in errors.TunemriError.__subclasses__()}
    assert kinds == set(re.findall(r"^\| `(\w+)` \| `\w+` \| (\d)", declared.errors(), re.M))


def test_the_reference_has_every_public_name():
    text = declared.python()
    for name in tunemri.__all__:
        assert name == "__version__" or re.search(rf"(?:\.|### ){name}\b", text), name


@pytest.mark.parametrize("name", methods.bundled())
def test_every_model_has_a_card_that_agrees_with_its_header(name):
    text = (ROOT / f"docs/models/{name}.md").read_text(encoding="utf-8")
    assert f"<!-- generated: card {name} -->" in text
    for heading in ("## Intended use", "## Training data", "## Limits"):
        assert heading in text
    recipe = methods.card(methods.bundled()[name])["recipe"]
    said = set(re.findall(r"^- `(\w+)`:", text, re.M))
    assert said == set(recipe["images"]), "the sets that the card names are not those of the header"
    numbers = re.findall(r"\d+\.\d+ ?(?:dB|%)|\b0\.\d{3,}", text)
    assert not numbers, f"scores come from the header, these are by hand: {numbers}"
    card = declared.card(name)
    assert recipe["scores"]["command"] in card
    for value in re.findall(r"\d+\.\d+", str([v for v in recipe["scores"].values() if isinstance(v, dict)])):
        assert f"{float(value):g}" in card, value
