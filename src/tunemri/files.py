"""Safe opening and atomic writing, shared by every reader and writer.

Before a library sees a file, three questions are answered here: may it be opened at all (`check`), what do its
bytes say it is (`sniff`), and how much memory does it claim (`check_declared`). HDF5 gets a section of its own,
because it alone can point into other files. Every output goes through `write_atomically`; what belongs together
appears together, its record (.json) last: where the record lies, the output is whole and is the one that it tells of.
"""

from __future__ import annotations

import difflib
import errno
import functools
import gzip
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    import h5py
    import numpy as np

__all__ = [
    "StrPath",
    "check",
    "check_declared",
    "check_target",
    "check_unchanged",
    "claimed",
    "environment_error",
    "hdf5_array",
    "hdf5_attribute",
    "hdf5_dataset",
    "hdf5_keys",
    "make_folder",
    "open_hdf5",
    "read_npy_header",
    "read_npy_stream",
    "same_file",
    "sha256",
    "sniff",
    "unfinished",
    "write_atomically",
    "write_folder_atomically",
    "write_with_record",
]

StrPath = str | os.PathLike[str]

GIB = 2**30
LIMIT_VARIABLE = "TUNEMRI_MAX_BYTES"


# ---------------------------------------------------------------- opening


def check(path: StrPath) -> Path:
    """The path, once it is known to name a non-empty, readable, ordinary file. Nothing is opened before that.

    Raises:
        UnreadableFile: missing, empty, a folder, a pipe, a socket, a device or a dangling link;
            with exit status 3 where the permission is missing.
    """
    p = Path(path)
    try:
        mode, size = (info := os.stat(p)).st_mode, info.st_size
    except FileNotFoundError:
        if p.is_symlink():
            raise errors.UnreadableFile(
                f"a link to {os.readlink(p)!r}, which does not exist", file=path, help="is a disk not mounted?"
            ) from None
        raise errors.UnreadableFile("no such file", file=path, help=_nearest_file(p)) from None
    except PermissionError:
        raise _no_permission(path) from None
    except (OSError, ValueError) as e:  # too long a name, a loop of links, a NUL byte
        raise errors.UnreadableFile(f"not a usable file name: {_reason(e)}", file=path) from None
    if stat.S_ISDIR(mode):
        raise errors.UnreadableFile("a folder, expected a file", file=path, help="name one of the files in it")
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise errors.UnreadableFile(f"a {kind}, expected an ordinary file", file=path, help="copy the data into a file")
    if size == 0:
        raise errors.UnreadableFile("empty (0 bytes)", file=path, help="copy or download it again")
    if not os.access(p, os.R_OK):
        raise _no_permission(path)
    return p


def _no_permission(path: StrPath) -> errors.UnreadableFile:
    return errors.UnreadableFile("no permission to read it", file=path, help="see ls -l", exit_code=3)


def _nearest_file(p: Path) -> str:
    try:
        names = [entry.name for entry in os.scandir(p.parent)]
    except OSError:
        return f"the folder {str(p.parent)!r} does not exist or cannot be read"
    near = difflib.get_close_matches(p.name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"nothing in {str(p.parent)!r} has a name like it"


def _reason(e: BaseException) -> str:
    """What a foreign exception says, without its address or line breaks."""
    text = getattr(e, "strerror", None) or str(e) or type(e).__name__
    return " ".join(str(text).split())[:160]


@contextmanager
def check_unchanged(path: StrPath) -> Iterator[None]:
    """Raise `UnreadableFile` if the file was replaced, grew or shrank while the block read it."""

    def stamp() -> tuple[int, int, int] | None:
        try:
            info = os.stat(path)
        except OSError:
            return None
        return info.st_ino, info.st_size, info.st_mtime_ns

    before = stamp()
    yield
    if stamp() != before:
        raise errors.UnreadableFile("changed while it was being read", file=path, help="wait until it is complete")


def same_file(a: StrPath, b: StrPath) -> bool:
    """Whether two names lead to one file, through links or spellings; neither has to exist."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def sha256(path: StrPath) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with open(check(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------- what is it?

_MAGIC = (
    (b"MATLAB 7.3 MAT-file", "mat73"),
    (b"MATLAB 5.0 MAT-file", "mat5"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"\x93NUMPY", "npy"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
)


def sniff(path: StrPath) -> str:
    """What the first bytes of a file say it is; the suffix decides only for `.cfl`, which has no signature.

    Returns:
        hdf5 mat73 mat5 npy npz zip nifti gzip png jpeg tiff dicom ismrmrd-stream safetensors cfl pickle html xml text
        unknown
    """
    with open(path, "rb") as f:
        head = f.read(2048)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK"):
        return _sniff_zip(path)
    if head.startswith(b"\x1f\x8b"):
        return _sniff_gzip(path)
    if _is_nifti(head):
        return "nifti"
    if head[128:132] == b"DICM":
        return "dicom"
    if any(head[at : at + 8] == b"\x89HDF\r\n\x1a\n" for at in (512, 1024)):
        return "hdf5"
    if _is_ismrmrd_stream(head):
        return "ismrmrd-stream"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "safetensors"
    if Path(path).suffix.lower() in (".cfl", ".hdr"):
        return "cfl"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "pickle"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if start.startswith((b"<?xml", b"<!doctype")):
        return "xml"
    control = sum(byte < 9 or 13 < byte < 32 or byte == 127 for byte in head)
    return "text" if control == 0 and _is_utf8(head) else "unknown"


def _is_utf8(head: bytes) -> bool:
    try:
        head[: len(head) - 3].decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def _is_ismrmrd_stream(head: bytes) -> bool:
    """A first message that names a configuration, spells it out, or is the header; the latter two as XML."""
    kind, length = head[:2], int.from_bytes(head[2:6], "little")
    if kind == b"\1\0":  # 1024 bytes of name, then the next message
        return head[1026:1028] in (b"\2\0", b"\3\0")
    return kind in (b"\2\0", b"\3\0") and 16 < length < 2**27 and head[6:].lstrip()[:1] == b"<"


def _sniff_zip(path: StrPath) -> str:
    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
    except Exception:  # zipfile raises a dozen kinds on damaged archives
        return "zip"
    if any(name.endswith("data.pkl") for name in names):
        return "pickle"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"


def _sniff_gzip(path: StrPath) -> str:
    try:
        with gzip.open(path) as f:
            return "nifti" if _is_nifti(f.read(352)) else "gzip"
    except (OSError, EOFError, zlib.error):
        return "gzip"


def check_declared(
    shape: Sequence[int],
    itemsize: int,
    stored_bytes: int,
    *,
    file: StrPath,
    key: str | None = None,
    ratio: float = 1000,
    above: int = 4 * GIB,
) -> None:
    """Refuse an array that claims far more memory than its file could fill; call it before allocating.

    Refused: more than `above` bytes declared and more than `ratio` times what is stored, or more than 64 GiB.
    The environment variable TUNEMRI_MAX_BYTES, where set, replaces both limits.

    Raises:
        TooLarge, BadOption (the variable is not a number).
    """
    declared = math.prod(int(n) for n in shape) * itemsize
    raised = os.environ.get(LIMIT_VARIABLE)
    if raised is not None and not raised.isdecimal():
        raise errors.BadOption(f"found {raised!r}, expected a number of bytes", key=LIMIT_VARIABLE)
    hard = int(raised) if raised is not None else 64 * GIB
    inflated = raised is None and declared > above and declared > ratio * stored_bytes
    if declared > hard or inflated:
        limit = f"{above / GIB:.3g} GiB for an array stored in {stored_bytes} bytes" if inflated else f"{hard} bytes"
        raise errors.TooLarge(
            f"declares shape {tuple(int(n) for n in shape)}, {declared / GIB:.4g} GiB; the limit is {limit}",
            file=file, key=key, help=f"if it is real, set {LIMIT_VARIABLE}={declared}",
        )  # fmt: skip


# ---------------------------------------------------------------- numpy streams


def read_npy_header(f: Any, *, file: StrPath, key: str | None = None) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, type and column-major order of the .npy array at the start of a binary stream.

    Raises:
        UnsafeContent: Python objects. UnreadableFile: damaged.
    """
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(f)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(f)
    except (Exception, MemoryError) as e:  # the header is parsed as Python: half a dozen kinds of exceptions
        raise errors.UnreadableFile(f"damaged array header: {_reason(e)}", file=file, key=key) from e
    if dtype.hasobject:
        raise errors.UnsafeContent(
            "an array of Python objects, which could run code when loaded", file=file, key=key,
            help="save it as a numeric array",
        )  # fmt: skip
    if any(n < 0 for n in shape):
        raise errors.UnreadableFile(f"damaged array header: shape {shape}", file=file, key=key)
    return shape, dtype, fortran


def read_npy_stream(f: Any, stored_bytes: int, *, file: StrPath, key: str | None = None) -> np.ndarray:
    """The .npy array at the start of a binary stream: never an object, never more than is there.

    Arguments:
        stored_bytes: bytes that the stream holds on disk, for the limit of `check_declared`.

    Raises:
        UnsafeContent, UnsupportedLayout, TooLarge, UnreadableFile.
    """
    import numpy as np

    shape, dtype, fortran = read_npy_header(f, file=file, key=key)
    if dtype.kind not in "biufcV" or dtype.itemsize == 0:
        raise errors.UnsupportedLayout(f"found values of type {dtype}, expected numbers", file=file, key=key)
    check_declared(shape, dtype.itemsize, stored_bytes, file=file, key=key)
    data = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    filled = 0
    try:
        while filled < len(data) and (got := f.readinto(data[filled:].data)):
            filled += got
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as e:
        raise errors.UnreadableFile(f"damaged: {_reason(e)}", file=file, key=key, help=_AGAIN) from e
    if filled != len(data):
        raise errors.UnreadableFile(f"truncated: {filled} of {len(data)} bytes", file=file, key=key, help=_AGAIN)
    return data.view(dtype).reshape(shape, order="F" if fortran else "C")


_AGAIN = "copy or download it again"


# ---------------------------------------------------------------- HDF5

_FILTERS = {32000: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd"}


@contextmanager
def open_hdf5(path: StrPath) -> Iterator[h5py.File]:
    """An HDF5 file opened for reading, its failures in our words.

    Raises:
        UnreadableFile: truncated, damaged, left open by a writer.
        Busy: another program is writing it now.
    """
    import h5py

    try:
        h = h5py.File(path, "r")
    except BlockingIOError:
        raise errors.Busy("another program has it open for writing", file=path, help="wait until it is done") from None
    except Exception as e:
        raise _hdf5_refusal(e, path) from e
    try:
        yield h
    finally:
        h.close()


def _hdf5_refusal(e: Exception, path: StrPath) -> errors.UnreadableFile:
    text = str(e)
    if cut := re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", text):
        return errors.UnreadableFile(f"truncated: {cut[1]} of {cut[2]} bytes", file=path, help=_AGAIN)
    if "already open" in text or "h5clear" in text:
        return errors.UnreadableFile(
            "its writer was stopped before closing it", file=path, help="h5clear -s FILE may repair a copy of it"
        )
    return errors.UnreadableFile(f"damaged HDF5: {_reason(e)}", file=path, help=_AGAIN)


def hdf5_keys(h: h5py.File, path: StrPath) -> list[str]:
    """Names at the top of the file, links included but not followed."""
    try:
        return [str(name) for name in h]
    except Exception as e:
        raise _hdf5_refusal(e, path) from e


def hdf5_dataset(h: h5py.File, name: str, path: StrPath) -> h5py.Dataset | h5py.Group | None:
    """The object of that name, or None; soft links are followed inside the file, nothing leads out of it.

    Raises:
        UnsafeContent: an external link, external raw data or a virtual dataset: it would read another file.
        UnreadableFile: links in a circle, a damaged entry.
    """
    import h5py

    found = _follow(h, name, path, name, 0)
    if not isinstance(found, h5py.Dataset):
        return found
    try:
        plist = found.id.get_create_plist()
        outside = found.is_virtual or plist.get_external_count() > 0
    except Exception as e:
        raise errors.UnreadableFile(f"damaged dataset: {_reason(e)}", file=path, key=name) from e
    if outside:
        raise _outside(path, name, "takes its values from another file")
    return found


def _outside(path: StrPath, key: str, what: str) -> errors.UnsafeContent:
    return errors.UnsafeContent(what, file=path, key=key, help="copy the data into the file (h5repack)")


def _follow(h: h5py.Group, name: str, path: StrPath, key: str, depth: int) -> Any:
    import h5py

    if depth > 16:
        raise errors.UnreadableFile("links that lead in a circle", file=path, key=key)
    here: Any = h.file["/"] if name.startswith("/") else h
    for part in [part for part in name.split("/") if part not in ("", ".")]:
        if not isinstance(here, h5py.Group):
            return None
        try:
            link = here.get(part, getlink=True)
            if isinstance(link, h5py.HardLink):
                here = here[part]
                continue
        except Exception as e:
            raise errors.UnreadableFile(f"damaged entry: {_reason(e)}", file=path, key=key) from e
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise _outside(path, key, f"a link into another file, {link.filename!r}")
        here = _follow(here, link.path, path, key, depth + 1)
    return here


def hdf5_array(dataset: h5py.Dataset, path: StrPath, *, rows: slice | None = None) -> np.ndarray:
    """The values of a numeric dataset, or of `rows` along its first axis, after the memory check.

    Raises:
        TooLarge.
        UnreadableFile: a failed checksum, a missing piece, a compression filter that is not installed.
    """
    import numpy as np

    name = dataset.name.lstrip("/") if dataset.name else "?"
    length = len(range(*rows.indices(dataset.shape[0]))) if rows is not None else None
    shape = dataset.shape if length is None else (length, *dataset.shape[1:])
    share = 1.0 if length is None else length / max(dataset.shape[0], 1)
    try:
        stored = int(dataset.id.get_storage_size() * share)
        sound = _sound_type(dataset.id.get_type(), dataset.dtype)
    except Exception as e:
        raise errors.UnreadableFile(f"damaged dataset: {_reason(e)}", file=path, key=name) from e
    if not sound:
        raise errors.UnreadableFile(f"damaged or unusual number type, seen as {dataset.dtype}", file=path, key=name)
    check_declared(shape, dataset.dtype.itemsize, stored, file=path, key=name)
    try:
        return np.asarray(dataset[rows] if rows is not None else dataset[()])
    except MemoryError:
        raise
    except Exception as e:
        if (number := _missing_filter(dataset)) is not None:
            raise errors.UnreadableFile(
                f"needs HDF5 filter {number} ({_FILTERS.get(number, 'name unknown')})", file=path, key=name,
                help="rewrite it with h5repack -f GZIP=4 where that filter is installed",
            ) from e  # fmt: skip
        raise errors.UnreadableFile(f"damaged data: {_reason(e)}", file=path, key=name, help=_AGAIN) from e


def _sound_type(stored: Any, dtype: np.dtype) -> bool:
    """Whether numpy's type is the stored one exactly.

    A flipped bit in the description of a number makes h5py choose another one, of another size; converting then
    writes beyond the array and ends the process.
    """
    import h5py
    import numpy as np

    if dtype.kind == "O" and isinstance(item := h5py.check_vlen_dtype(dtype), np.dtype):
        return isinstance(stored, h5py.h5t.TypeVlenID) and _sound_type(stored.get_super(), item)
    if dtype.kind == "O":
        return h5py.check_string_dtype(dtype) is not None
    if dtype.kind in "SUb":
        return bool(stored.get_size() == dtype.itemsize)
    if dtype.kind == "c" and isinstance(stored, h5py.h5t.TypeCompoundID):
        part = np.dtype(f"{dtype.byteorder}f{dtype.itemsize // 2}")
        return stored.get_nmembers() == 2 and all(_sound_type(stored.get_member_type(i), part) for i in range(2))
    if dtype.kind == "c":  # a type of its own since HDF5 2.0
        return bool(stored.get_size() == dtype.itemsize)
    if dtype.fields is not None:
        members = [(dtype.fields[name][1], dtype.fields[name][0]) for name in dtype.names or ()]
        ends = [start + part.itemsize for start, part in members]
        starts = [start for start, _ in members[1:]] + [dtype.itemsize]
        apart = all(end <= start for end, start in zip(ends, starts, strict=True))
        return apart and all(_sound_type(stored.get_member_type(i), part) for i, (_, part) in enumerate(members))
    return bool(stored.equal(h5py.h5t.py_create(dtype)))


def _missing_filter(dataset: h5py.Dataset) -> int | None:
    import h5py

    try:
        plist = dataset.id.get_create_plist()
        numbers = [int(plist.get_filter(i)[0]) for i in range(plist.get_nfilters())]
        return next((number for number in numbers if not h5py.h5z.filter_avail(number)), None)
    except Exception:
        return None


def hdf5_attribute(h: Any, name: str) -> Any:
    """An attribute, or None where it is absent or cannot be decoded: attributes are notes, never a reason to stop."""
    try:
        return h.attrs.get(name)
    except Exception:
        return None


# ---------------------------------------------------------------- writing


@contextmanager
def write_atomically(path: StrPath, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`; at the end of the block the file takes its final name, complete.

    The temporary file is in the same folder (a rename across disks is a copy, which a full disk interrupts), keeps
    the suffix (libraries choose the format by it), and is flushed to the disk before the rename. Whatever goes
    wrong, an earlier `path` stays as it was and no temporary file is left; what a killed process left in the folder is
    removed by the next one that writes there.

    Raises:
        BadOption: it exists and `overwrite` is False, or is no ordinary file; with exit status 3 where the
            folder is missing or may not be written.
        NoSpace: the disk or the quota is full.
    """
    final = Path(path)
    check_target(final, overwrite=overwrite)
    # A short name of its own: a file name may already be as long as the system allows.
    suffix = "".join(s for s in final.suffixes[-2:] if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", s))
    temporary = _temporary(final.parent, suffix)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush(temporary)
        if not overwrite:
            check_target(final, overwrite=overwrite)
        os.replace(temporary, final)
        _flush(final.parent)
    except errors.TunemriError:
        raise
    except Exception as e:
        if (ours := environment_error(e, final)) is None:
            raise
        raise ours from e
    finally:
        temporary.unlink(missing_ok=True)


_PROCESS = secrets.token_hex(4)  # tells this process from an earlier one with its number


@functools.cache
def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _temporary(folder: Path, suffix: str = "") -> Path:
    """A name for what is not finished; names of that kind whose makers were killed are removed first."""
    for entry in folder.glob(".tunemri-*-*-*-*"):
        machine, pid, process = entry.name.split("-")[1:4]
        if machine != _machine() or not pid.isdecimal():
            continue  # of another machine: we cannot know whether it still writes
        # In a container a restarted command has the number of the one that was killed: our own.
        if process != _PROCESS if int(pid) == os.getpid() else not _alive(int(pid)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):
                    entry.unlink()
    return folder / f".tunemri-{_machine()}-{os.getpid()}-{_PROCESS}-{secrets.token_hex(4)}{suffix}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return pid > 0


def check_target(path: StrPath, *, overwrite: bool = False) -> None:
    """Refuse, before any work is done, an output that could not be written at its end.

    Raises:
        BadOption: it exists and `overwrite` is False, or is no ordinary file; with exit status 3 where the
            folder is missing or may not be written.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise _no_folder(final)
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise _forbidden(final, errno.EACCES)
    try:
        mode = os.stat(final).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as e:
        raise errors.BadOption(f"cannot be written: {_reason(e)}", file=final) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not an ordinary file"
        raise errors.BadOption(f"cannot be written: {kind}", file=final, help="name a file")
    if not overwrite:
        raise errors.BadOption("exists already", file=final, help="choose another name or give --overwrite")


def _flush(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # one that takes files and shows none: written all the same
            return
        raise
    try:
        os.fsync(handle)
    except OSError as e:
        if not (path.is_dir() and e.errno == errno.EINVAL):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def environment_error(e: BaseException, path: StrPath) -> errors.TunemriError | None:
    """The error of ours for a failure of disk, folder or permission; None where it is neither."""
    final = Path(path)
    number = getattr(e, "errno", None)
    if number is None and (said := re.search(r"errno = (\d+)", str(e))):  # h5py keeps it in its text
        number = int(said[1])
    # numpy says only that a write was cut short, and an ordinary file is cut short by nothing else.
    cut = re.search(r"\d+ requested and \d+ written|problem writing element", str(e))
    if cut or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return errors.NoSpace("the disk or quota is full", file=final, help="free some space; nothing was changed")
    if number == errno.EIO:
        return errors.NoSpace("the disk reports an input/output error", file=final, help="try another disk")
    if number == errno.ENOENT:
        return _no_folder(final)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return _forbidden(final, number)
    if number == errno.ENAMETOOLONG:
        return errors.BadOption("cannot be written: the name is too long", file=final)
    return None


def _no_folder(final: Path) -> errors.BadOption:
    return errors.BadOption(
        f"cannot be written: the folder {str(final.parent)!r} does not exist", file=final, help="make it first",
        exit_code=3,
    )  # fmt: skip


def _forbidden(final: Path, number: int) -> errors.BadOption:
    return errors.BadOption(f"cannot be written: {os.strerror(number).lower()}", file=final, exit_code=3)


def make_folder(path: StrPath) -> Path:
    """The folder, made with its parents if it is not there.

    Raises:
        BadOption: something else has that name; with exit status 3 where it may not be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise errors.BadOption("exists and is not a folder", file=folder, help="name another folder") from None
    except OSError as e:
        raise environment_error(e, folder) or errors.BadOption(f"cannot be made: {_reason(e)}", file=folder) from e
    return folder


@contextmanager
def write_folder_atomically(path: StrPath, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`; at the end of the block its files appear in `path`, all of them or none.

    Files of `path` that the block does not write stay as they are, with `overwrite` too. A kill while files are being
    replaced leaves a folder without its record, see `_move_into`.

    Raises:
        BadOption: the folder exists and is not empty, and `overwrite` is False. NoSpace: as in `write_atomically`.
    """
    final = Path(path)

    def check() -> None:
        if final.exists() and not final.is_dir():
            raise errors.BadOption("exists and is not a folder", file=final, help="name another folder")
        if final.is_dir() and any(final.iterdir()) and not overwrite:
            raise errors.BadOption("exists already", file=final, help="choose another name or give --overwrite")

    check()
    parent = make_folder(final.absolute().parent)
    with _made_aside(parent, final) as temporary:
        yield temporary
        check()  # somebody may have been quicker
        if not final.exists():
            os.replace(temporary, final)
        else:
            _move_into(temporary, final)
        _flush(parent)


@contextmanager
def write_with_record(path: StrPath, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`; at the end of the block its files appear beside `path`, all of them or none.

    For an output with its record: the block writes both under their final names into the folder.

    Raises:
        BadOption: one of the files exists and `overwrite` is False. NoSpace: as in `write_atomically`.
    """
    final = Path(path)
    check_target(final, overwrite=overwrite)
    with _made_aside(final.parent, final) as temporary:
        try:
            yield temporary
        except errors.TunemriError as e:
            if e.file is not None and Path(e.file).parent == temporary:
                e.file = final.parent / Path(e.file).name  # what the user calls it
            raise
        for made in temporary.iterdir():
            check_target(final.parent / made.name, overwrite=overwrite)
        _move_into(temporary, final.parent)


@contextmanager
def _made_aside(parent: Path, final: Path) -> Iterator[Path]:
    temporary = _temporary(parent)
    try:
        temporary.mkdir()
        yield temporary
    except OSError as e:
        if (ours := environment_error(e, final)) is None:
            raise
        raise ours from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into(temporary: Path, final: Path) -> None:
    """Move every file, its records last. A record that is replaced goes first: a kill in between leaves an output
    without a record, never one with the record of another."""
    made = sorted(path.relative_to(temporary) for path in temporary.rglob("*"))
    records = [path for path in made if path.suffix == ".json"]
    for path in records:
        (final / path).unlink(missing_ok=True)
    for path in [path for path in made if path not in records] + records:
        if (temporary / path).is_dir():
            (final / path).mkdir(exist_ok=True)
        else:
            os.replace(temporary / path, final / path)
    _flush(final)


# ---------------------------------------------------------------- long work


@contextmanager
def claimed(folder: StrPath, doing: str) -> Iterator[None]:
    """Hold a folder: a second process is refused; the claim of a dead process of this machine is taken over.

    Arguments:
        doing: what the holder does there, for the message: "training".

    Raises:
        Busy: somebody else holds it.
    """
    lock = Path(folder) / "lock.json"
    mine: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            try:
                holder = json.loads(lock.read_text())
                # In a container a restarted run has the number of the one that was killed: our own.
                alive = int(holder["pid"]) != mine["pid"] and _alive(int(holder["pid"]))
                gone = holder["host"] == mine["host"] and not alive
            except (OSError, ValueError, TypeError, KeyError):
                holder, gone = {"pid": "?", "host": "?"}, False  # not written yet, or not by us: leave it alone
            if not gone:
                raise errors.Busy(
                    f"process {holder['pid']} on {holder['host']} is {doing} here", file=folder,
                    help=f"wait for it, or remove {lock.name} if it is gone",
                ) from None  # fmt: skip
            lock.unlink(missing_ok=True)
    try:
        with os.fdopen(handle, "w") as f:
            json.dump(mine, f)
        yield
    finally:
        lock.unlink(missing_ok=True)


@contextmanager
def unfinished(path: StrPath, doing: str) -> Iterator[Path]:
    """`PATH.unfinished`, a folder for the parts (`part-*`) of an output that takes long, held by one process.

    The same command finds there what an interrupted or killed one had finished. It is gone once the block ends; an
    error removes only what this block made.

    Raises:
        Busy: another process is making the same output.
    """
    final = Path(path).absolute()
    folder = make_folder(final.with_name(final.name + ".unfinished"))
    try:
        with claimed(folder, doing):
            earlier = set(folder.glob("part-*"))
            try:
                yield folder
            except Exception:
                _remove(set(folder.glob("part-*")) - earlier)
                raise
            _remove(folder.glob("part-*"))
    finally:
        with suppress(OSError):  # not empty: kept, held by another, or somebody keeps something else there
            folder.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
