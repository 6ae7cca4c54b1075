"""Runs the code of a page while the site is built: what a page shows is what came out.

    ```python run ALT       the value of the last line is shown: a figure as a picture (ALT says what is on it), the rest as text
    ```console run          each line `$ tunemri …` runs as the command line would; one that ends in `# exit 2` must end so

The blocks of a page share their names and one empty folder. A block that fails, or warns, fails the build.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["BLOCK", "Failed", "run_page"]

BLOCK = re.compile(r"^```(?P<language>python|console) run(?P<alt>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)


class Failed(Exception):
    """A block did not do what its page says."""


def run_page(markdown: str, picture: Callable[[bytes], str]) -> str:
    """The page with what its blocks gave below each of them.

    Arguments:
        picture: keeps a PNG file and returns the link to it.

    Raises:
        Failed: a block raised, warned, or ended with another status than the page says.
    """
    names: dict[str, Any] = {"__name__": "page"}

    def run(found: re.Match[str]) -> str:
        code, alt = found["code"], found["alt"].strip()
        try:
            if found["language"] == "console":
                return f"```console\n{_console(code)}```"
            return f"```python\n{code}```\n\n{_python(code, names, alt, picture)}"
        except Failed:
            raise
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}, in\n{code}") from error

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return BLOCK.sub(run, markdown)


def _python(code: str, names: dict[str, Any], alt: str, picture: Callable[[bytes], str]) -> str:
    lines, last = ast.parse(code).body, None
    if lines and isinstance(lines[-1], ast.Expr):
        last = compile(ast.Expression(lines.pop().value), "page", "eval")  # type: ignore[attr-defined]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), _strict():
        exec(compile(ast.Module(lines, []), "page", "exec"), names)
        value = None if last is None else eval(last, names)
    text = said.getvalue()
    draw = getattr(value, "png", None)
    if value is not None and draw is None:
        text += f"{value!r}\n"
    shown = f"```{{.text .output}}\n{text}```\n" if text else ""
    if draw is not None:
        if not alt:
            raise Failed(f"a picture without words for those who cannot see it, of\n{code}")
        shown += f"\n![{alt}]({picture(draw(dpi=100))})\n"
    return shown


def _console(code: str) -> str:
    shown = ""
    for line in code.replace("\\\n", "\\\0").splitlines():
        command = re.match(r"\$ tunemri (.*?)(?:# exit (\d))?$", line)
        if command is None:
            raise Failed(f"only commands of tunemri are run here, not {line!r}")
        text, status = _command(shlex.split(command[1].replace("\\\0", "")))
        if status != int(command[2] or 0):
            raise Failed(f"exit status {status} of {line!r}:\n{text}")
        shown += line.replace("\\\0", "\\\n") + "\n" + text
    return shown


def _command(arguments: list[str]) -> tuple[str, int]:
    """What a command says on both streams, and its exit status."""
    from tunemri.cli import main

    said, before, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["tunemri", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    # How long is left to wait is for those who wait.
    lines = [line for line in said.getvalue().splitlines(True) if not re.match(r"\w+ \d+(/\d+)?  .* s each", line)]
    return "".join(lines), status


@contextlib.contextmanager
def _strict() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # As in the tests: safetensors asks a torch storage in a way that torch announces to remove.
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield
