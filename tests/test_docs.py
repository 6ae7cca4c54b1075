"""What the pages say is so: Python blocks run, commands parse, links lead somewhere, lists are complete."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from tunemri import methods
from tunemri.cli import _spread_lists, app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if language in languages]


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
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


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
