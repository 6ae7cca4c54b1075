"""Every exception that tunemri raises to a user, one class per error word of the command line.

    TunemriError
    ├── UnreadableFile      the bytes are not what the name promises: missing, empty, cut, damaged
    ├── MissingKey          a file lacks something that it needs
    ├── InconsistentShapes  two arrays that belong together disagree
    ├── NonFinite           NaN or Inf where a number must be
    ├── UnsupportedLayout   readable, but not arranged in a way that we understand
    ├── NoData              nothing was measured: no slice, no sample, only zeros
    ├── TooLarge            declares more than the limit, found before memory is taken
    ├── UnsafeContent       would run code or reach other files
    ├── BadOption           an argument or option is outside what is allowed
    ├── WrongModel          weights that do not fit the method or the scan
    ├── NoSpace             the disk (environment)
    ├── NoMemory            the memory (environment)
    ├── Busy                somebody else is using it
    └── Internal            our bug

A message says what was found, what was expected, the likely cause and what to try.
`str(error)` is one line: `FILE: KEY: what; help`.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "BadOption",
    "Busy",
    "InconsistentShapes",
    "Internal",
    "MissingKey",
    "NoData",
    "NoMemory",
    "NoSpace",
    "NonFinite",
    "TooLarge",
    "TunemriError",
    "TunemriWarning",
    "UnreadableFile",
    "UnsafeContent",
    "UnsupportedLayout",
    "WrongModel",
    "did_you_mean",
    "lacks_memory",
    "warn",
]


class TunemriError(Exception):
    """Base of every error that tunemri raises.

    Arguments:
        what: what was found and what was expected, one sentence.
        file: the file at fault, as the user named it.
        key: the dataset, option or argument at fault.
        help: what to try next.
        exit_code: overrides the exit status of the class (a missing permission is
            an `UnreadableFile`, yet the environment's fault: 3).
    """

    word = "internal"
    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        help: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        self.what, self.file, self.key, self.help = what, file, key, help
        if exit_code is not None:
            self.exit_code = exit_code
        super().__init__(str(self))

    def __str__(self) -> str:
        where = [os.fspath(p) for p in (self.file, self.key) if p is not None]
        return ": ".join([*where, self.what]) + (f"; {self.help}" if self.help else "")


class UnreadableFile(TunemriError):
    word = "unreadable_file"


class MissingKey(TunemriError):
    word = "missing_key"


class InconsistentShapes(TunemriError):
    word = "inconsistent_shapes"


class NonFinite(TunemriError):
    word = "non_finite"


class UnsupportedLayout(TunemriError):
    word = "unsupported_layout"


class NoData(TunemriError):
    word = "no_data"


class TooLarge(TunemriError):
    word = "too_large"


class UnsafeContent(TunemriError):
    word = "unsafe_content"


class BadOption(TunemriError):
    word = "bad_option"


class WrongModel(TunemriError):
    word = "wrong_model"


class NoSpace(TunemriError):
    word = "no_space"
    exit_code = 3


class NoMemory(TunemriError):
    word = "no_memory"
    exit_code = 3


class Busy(TunemriError):
    word = "busy"


class Internal(TunemriError):
    word = "internal"
    exit_code = 4


class TunemriWarning(UserWarning):
    """Something that the user should know and that did not stop the work; `word` as for errors."""

    def __init__(self, message: str, word: str = "note") -> None:
        super().__init__(message)
        self.word = word


def warn(message: str, word: str = "note") -> None:
    """Issue a `TunemriWarning`; `word` is one of the error words, or "note"."""
    warnings.warn(TunemriWarning(message, word), stacklevel=3)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The help sentence for an unknown name: its nearest match, then (at most eight of) the known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {listed or 'none'}"


def lacks_memory(error: BaseException) -> bool:
    """Whether a foreign exception says that memory ran out; torch has no class for it on every device."""
    said = r"can(?:'t|not) allocate memory|out of memory|unable to allocate|bad allocation|failed to map segment"
    return isinstance(error, MemoryError) or re.search(said, str(error), re.IGNORECASE) is not None


@contextmanager
def enough_memory(otherwise: Callable[[], NoMemory]) -> Iterator[None]:
    """Where memory runs out inside, `otherwise()` is raised: it says what to cut."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise otherwise() from error
