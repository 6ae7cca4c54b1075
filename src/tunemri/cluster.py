"""Work in other processes and on other machines, behind the interface of concurrent.futures.

    with workers(address) as executor:                     None stands for this process: the same code runs here
        for index, outcome in each(work, units, executor):

`work` is a function that can be imported, a unit a small value: paths and settings, not arrays. What a worker reads for
one unit it may keep for the next (functools.lru_cache). A unit whose worker dies is done again elsewhere, and its
outcome arrives once. Any `concurrent.futures.Executor` will do; `workers` brings that of a dask scheduler.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import __version__, errors

__all__ = ["each", "workers"]

Unit = TypeVar("Unit")
Result = TypeVar("Result")
_PATIENCE = 10.0  # seconds for a scheduler to answer


@contextmanager
def workers(address: str | None) -> Iterator[Executor | None]:
    """An executor whose workers are those of the dask scheduler at `address`; None for None.

    A scheduler can make this process run code, and its workers run ours: name none but your own.

    Arguments:
        address: `tcp://HOST:PORT`, or the scheduler's file (`dask scheduler --scheduler-file FILE.json`).

    Raises:
        BadOption: dask is not installed, or no scheduler answers there (exit status 3).
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise errors.BadOption(
            "needs dask.distributed",
            key="cluster",
            help="in the clone of tunemri: pip install '.[cluster]'",
            exit_code=3,
        ) from None
    where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
    with _silenced():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a table of versions: `_Call` compares them, worker by worker
                client = Client(**where, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise errors.BadOption(
                f"no dask scheduler answers there: {' '.join(str(error).split())[:120]}",
                file=address, key="cluster", help="tcp://HOST:PORT, as `dask scheduler` prints it", exit_code=3,
            ) from error  # fmt: skip
        try:
            if not client.nthreads():
                errors.warn(f"no worker at {address} yet: waiting for one")
            yield client.get_executor(pure=False)
        finally:
            client.close(timeout=_PATIENCE)


def each(
    work: Callable[[Unit], Result], units: Sequence[Unit], executor: Executor | None = None
) -> Iterator[tuple[int, Result | Exception]]:
    """(index of a unit, what `work` returned for it or the exception that it raised), each once, as they are finished.

    A worker does one unit at a time, in the folder, with the command line and the number of threads of this process;
    its warnings are issued here. Leaving the loop early, Ctrl-C included, cancels what is not done.

    Arguments:
        executor: None does them here, in order.
    """
    if executor is None:
        for index, unit in enumerate(units):
            try:
                outcome: Result | Exception = work(unit)
            except Exception as error:
                outcome = error
            yield index, outcome
        return
    import torch

    call = _Call(work=work, folder=os.getcwd(), command=sys.argv, threads=torch.get_num_threads(), versions=_versions())
    futures = {executor.submit(call, unit): index for index, unit in enumerate(units)}
    try:
        for future in as_completed(futures):
            try:
                outcome, said = future.result()
                if said:
                    with _AT_WORK:  # a worker may be a thread of this process
                        for message, word in said:
                            errors.warn(message, word)
            except (Exception, CancelledError) as error:
                outcome = _translated(error)
            yield futures[future], outcome
    finally:
        for future in futures:
            future.cancel()


_AT_WORK = threading.Lock()  # folder, threads and warnings belong to the process: units take turns in it


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What travels to a worker with each unit."""

    work: Callable[[Any], Any]
    folder: str
    command: list[str]
    threads: int
    versions: dict[str, str]

    def __call__(self, unit: Any) -> tuple[Any, list[tuple[str, str]]]:
        import torch

        with _AT_WORK, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", errors.TunemriWarning)
            self._compare()
            before = os.getcwd(), sys.argv, torch.get_num_threads()
            try:
                os.chdir(self.folder)
            except OSError:
                raise errors.BadOption(
                    f"not there on the worker {socket.gethostname()}", file=self.folder, key="cluster",
                    help="workers must see the same folders under the same names", exit_code=3,
                ) from None  # fmt: skip
            # The command goes into records. The threads decide the order of sums, hence the last bit of an image.
            sys.argv = self.command
            torch.set_num_threads(self.threads)
            try:
                result = self.work(unit)
            finally:
                os.chdir(before[0])
                sys.argv = before[1]
                torch.set_num_threads(before[2])
            said = [(str(w.message), w.message.word) for w in caught if isinstance(w.message, errors.TunemriWarning)]
        return result, list(dict.fromkeys(said))

    def _compare(self) -> None:
        found = _versions()
        differ = [f"{name} {found[name]}, here {mine}" for name, mine in self.versions.items() if found[name] != mine]
        if found["tunemri"] != self.versions["tunemri"]:
            raise errors.BadOption(
                f"the worker {socket.gethostname()} has {differ[0]}",
                key="cluster",
                help="install the same",
                exit_code=3,
            )
        if differ:
            errors.warn(f"the worker {socket.gethostname()} has {'; '.join(differ)}: the last digits may differ")


def _versions() -> dict[str, str]:
    import numpy
    import torch

    return {
        "tunemri": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _translated(error: BaseException) -> Exception:
    """What went wrong between here and a worker, in our words; the errors of the work itself stay what they are."""
    if isinstance(error, CancelledError):
        return errors.BadOption("the scheduler went away", key="cluster", help="see its log", exit_code=3)
    if type(error).__name__ == "KilledWorker":
        return errors.NoMemory(
            "several workers died on the same part of the work", key="cluster",
            help="likely for want of memory: see a worker's log; larger workers, or fewer slices (--slice)",
        )  # fmt: skip
    if isinstance(error, ModuleNotFoundError) and error.name in ("tunemri", "torch", "numpy"):
        return errors.BadOption(
            f"the workers have no {error.name}", key="cluster", help="install the same version there", exit_code=3
        )
    assert isinstance(error, Exception)
    return error


@contextmanager
def _silenced() -> Iterator[None]:
    """dask's log reaches nobody here: what counts, we say ourselves."""
    handlers = logging.getLogger("distributed").handlers
    before = [handler.level for handler in handlers]
    try:
        for handler in handlers:
            handler.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for handler, level in zip(handlers, before, strict=True):
            handler.setLevel(level)
