"""What the command line says: one line per result, error and warning; progress; exit codes; sidecars.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from . import __version__, errors, files

__all__ = [
    "Progress",
    "Terminated",
    "as_error",
    "error_line",
    "guarded",
    "listen",
    "one_line",
    "plain",
    "resumable",
    "say",
    "sidecar",
    "sidecar_path",
]

_LONGEST = 300
_STOPPED = {130: "interrupted", 143: "terminated"}
_SHOWN: set[str] = set()  # warnings of this command: each is said once


class Terminated(BaseException):
    """SIGTERM arrived; carries the exit status."""


def one_line(text: str, longest: int = _LONGEST) -> str:
    """`text` on one line of at most `longest` characters, control characters escaped."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in _encodable(text)
    )
    return escaped if len(escaped) <= longest else escaped[: longest - 1] + "…"


def _encodable(text: str) -> str:
    # File names may hold bytes that are no text; show them as escapes.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def error_line(error: errors.TunemriError) -> str:
    """`error[CLASS]: FILE: KEY: what, expected, found; help`; a long help gives way before the cause does."""
    head = f"error[{error.word}]: "
    text = one_line(head + str(error), 10**6)
    if len(text) > _LONGEST and error.help:
        short = errors.TunemriError(error.what, file=error.file, key=error.key)
        text = one_line(head + str(short), 10**6)
    return one_line(text)


def say(text: str) -> None:
    """A line on standard error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    # What libraries warn of is for developers; what tunemri warns of is for the user.
    if (
        isinstance(message, errors.TunemriWarning)
        and (line := one_line(f"warning[{message.word}]: {message}")) not in _SHOWN
    ):
        _SHOWN.add(line)
        say(line)


def listen() -> None:
    """Show tunemri's warnings, each once, as one line, and any name; make SIGTERM end the program by the ordinary way out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that is no text, a terminal that knows ASCII alone
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", errors.TunemriWarning)
    _SHOWN.clear()

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Terminated(128 + signum)

    signal.signal(signal.SIGTERM, stop)


def as_error(error: BaseException) -> errors.TunemriError | None:
    """The tunemri error that an exception from elsewhere amounts to, or None: a bug of ours."""
    if isinstance(error, errors.TunemriError):
        return error
    if errors.lacks_memory(error):
        return errors.NoMemory("not enough memory", help="fewer slices at a time (--slice), or a smaller matrix")
    if isinstance(error, OSError) and error.errno is not None:
        return files.environment_error(error, error.filename or "")
    return None


def guarded(run: Callable[[], int | None], *, verbose: bool, as_json: bool) -> int:
    """Run a command and turn whatever happens into an exit status and at most one line."""
    try:
        status = run() or 0
    except Terminated as stop:
        status = int(stop.args[0])
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): point stdout elsewhere, so that closing it is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        known = as_error(error)
        if verbose:
            traceback.print_exc()
        if known is None:
            known = errors.Internal(
                f"{type(error).__name__}: {error}; this is a bug in tunemri, traceback in {_log(error)}",
                help="please report it",
            )
        say(error_line(known))
        if as_json:
            print(json.dumps({"ok": False, "error": describe(known), "exit_code": known.exit_code}))
        return known.exit_code
    if status in _STOPPED:  # also where the parser or a command made a status of the signal
        say(_STOPPED[status])
    return status


def describe(error: errors.TunemriError) -> dict[str, Any]:
    """The parts of an error, JSON-ready."""
    file = None if error.file is None else _encodable(os.fspath(error.file))
    return {"class": error.word, "file": file, "key": error.key, "what": error.what, "help": error.help}


def _log(error: Exception) -> str:
    try:
        with tempfile.NamedTemporaryFile("w", prefix="tunemri-", suffix=".log", delete=False) as f:
            f.write(f"tunemri {__version__}\n{sys.argv}\n")
            f.write("".join(traceback.format_exception(error)))
            return f.name
    except OSError:
        return "(no log could be written)"


class Progress:
    """`verb 12/20 0.8 s each 6 s left` on a terminal, redrawn; elsewhere a plain line every 30 seconds."""

    def __init__(self, verb: str, *, quiet: bool = False) -> None:
        self.verb, self.quiet = verb, quiet
        self.live = sys.stderr.isatty()
        self.start = self.told = time.monotonic()
        self.drawn = False

    def __call__(self, done: int, total: int) -> None:
        """Tell that `done` of `total` are done (total 0: unknown)."""
        now = time.monotonic()
        if self.quiet or now - self.told < (0.1 if self.live else 30) and done != total:
            return
        each = (now - self.start) / max(done, 1)
        left = f"{each * (total - done):.0f} s left" if total else ""
        text = f"{self.verb} {done}{f'/{total}' if total else ''}  {each:.2g} s each  {left}"
        if self.live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self.drawn = True
        elif now - self.told >= 30:
            say(text)
        self.told = now

    def close(self) -> None:
        """Remove the line."""
        if self.drawn:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


@contextmanager
def progress(verb: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A `Progress` that cleans up after itself."""
    bar = Progress(verb, quiet=quiet)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def resumable(sentence: Callable[[], str]) -> Iterator[None]:
    """Says `sentence()` when the block is interrupted or terminated: what is saved, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        say(sentence())
        raise


def plain(value: Any) -> Any:
    """JSON-ready copy: tensors to lists, NaN and Inf to None, paths and odd text to text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, bool | int):
        return value
    return _encodable(str(value))


def sidecar_path(output: Path) -> Path:
    """`OUT.json`, next to OUT."""
    return output.with_name(output.name + ".json")


def sidecar(output: Path, facts: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write what is needed to understand and repeat an output."""
    common = {
        "tunemri": __version__,
        "command": [_encodable(a) for a in ["tunemri", *sys.argv[1:]]],
        "python": platform.python_version(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if "torch" in sys.modules:
        common["torch"] = str(sys.modules["torch"].__version__)
    with files.write_atomically(sidecar_path(output), overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(plain({**common, **facts}), indent=1, allow_nan=False) + "\n", encoding="utf-8")
