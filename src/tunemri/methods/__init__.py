"""METHODS, and how their weights are saved and loaded: safetensors with the whole recipe in the header, never pickle."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from .. import errors, files
from ..cards import FORMAT, bundled, card
from .base import Dial, Reconstructor, prepare, reconstruct
from .classical import Sense, TotalVariation, Wavelet, ZeroFilled
from .generative import Generative
from .hyperrecon import HyperRecon, SingleWeight
from .metalearned import MetaLearned

__all__ = [
    "METHODS",
    "Dial",
    "Reconstructor",
    "bundled",
    "card",
    "load",
    "make",
    "needs_weights",
    "prepare",
    "reconstruct",
    "save",
]

METHODS: dict[str, type[Reconstructor]] = {
    "zero-filled": ZeroFilled,
    "sense": Sense,
    "tv": TotalVariation,
    "wavelet": Wavelet,
    "hyperrecon": HyperRecon,
    "single-weight": SingleWeight,
    "meta-learned": MetaLearned,
    "generative": Generative,
}

_MAX_TENSORS = 20_000  # that a constructor may make; ours make a few hundred
_FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.arange, torch.linspace,
}  # fmt: skip


def make(method: str, arguments: Mapping[str, Any] | None = None) -> Reconstructor:
    """A method by name, built from its constructor arguments.

    Raises:
        BadOption: no such method, or an argument that it does not take or lacks.
    """
    if method not in METHODS:
        raise errors.BadOption(f"found {method!r}", key="method", help=errors.did_you_mean(method, METHODS))
    kind, arguments = METHODS[method], dict(arguments or {})
    known = inspect.signature(kind).parameters
    for name in arguments:
        if name not in known:
            raise errors.BadOption(
                f"{method} takes no argument {name!r}", key="arguments", help=errors.did_you_mean(name, known)
            )
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise errors.BadOption(f"{method} needs {', '.join(missing)}", key="arguments")
    return kind(**arguments)


def save(
    model: Reconstructor, path: str | Path, recipe: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> None:
    """Write weights and everything needed to rebuild and judge them.

    Arguments:
        recipe: what made them: data, training, seed, commit, scores; JSON-ready.

    Raises:
        NonFinite: a weight is NaN or Inf. BadOption: the file exists.
    """
    method = next((name for name, kind in METHODS.items() if type(model) is kind), None)
    if method is None:
        raise errors.BadOption(f"{type(model).__name__} is not in METHODS, so no file could name it", key="model")
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise errors.NonFinite("weights are not finite, not saved", file=path, key=name)
    dials = {name: dial.as_dict() for name, dial in model.dials.items()}
    header = {
        "format": FORMAT,
        "method": method,
        "arguments": dict(model.arguments),
        "dials": dials,
        "recipe": dict(recipe or {}),
    }
    if proved := model.guarantees():
        header["guarantees"] = proved
    header["sha256"] = _checksum(header, tensors)
    with files.write_atomically(path, overwrite=overwrite) as temporary:
        # Not save_file: it replaces the file by one that only its owner may read.
        temporary.write_bytes(safetensors.torch.save(tensors, {"tunemri": json.dumps(header, sort_keys=True)}))


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of all that a weights file says, the checksum itself apart: it tells of damage, not of who wrote it."""
    rest = json.loads(json.dumps({key: value for key, value in header.items() if key != "sha256"}))
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def needs_weights(method: str) -> bool:
    """Whether a method of METHODS is trained: one that has a loss to minimise gives no image worth having without weights."""
    return METHODS[method].loss is not Reconstructor.loss


def load(name: str | Path) -> Reconstructor:
    """A reconstructor ready for use: a bundled model, a `.safetensors` file, or a method that needs no weights.

    Raises:
        BadOption: neither a name nor a file. WrongModel: a header that does not fit this version's methods, or
            tensors that do not fit the header. UnreadableFile, UnsafeContent, NonFinite: what the file holds.
    """
    text = str(name)
    if text in (shipped := bundled()):
        return _read(shipped[text])
    if text in METHODS:
        if not needs_weights(text):
            return METHODS[text]().eval()
        raise errors.BadOption(
            f"{text} needs trained weights", key="model", help=f"name a file, or one of: {', '.join(shipped)}"
        )
    path = Path(text)
    if not path.suffix and not path.exists():
        known = [*shipped, *(n for n in METHODS if not needs_weights(n))]
        raise errors.BadOption(f"found {text!r}", key="model", help=errors.did_you_mean(text, known))
    return _read(path)


class _WithinMeans(TorchFunctionMode):
    """While a network is built from a file's header, nothing much larger than the file is allocated.

    The header is a stranger's: it may ask for ten billion stages. Sizes are looked at before memory is taken.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.tensors = numbers, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            given = [*args, (kwargs or {}).get("size", ())]
            sizes = [n for a in given for n in (a if isinstance(a, tuple | list) else [a]) if isinstance(n, int)]
            self.tensors += 1
            # The network that a hypernetwork writes its weights into is no larger than its last layer.
            if math.prod(sizes) > 4 * self.numbers + 10**6 or self.tensors > _MAX_TENSORS:
                raise errors.WrongModel(f"a network far larger than the {self.numbers} numbers in the file")
        return func(*args, **(kwargs or {}))


def _read(path: Path) -> Reconstructor:
    header = card(path)
    with safe_open(path, "pt") as f:
        numbers = sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118 (not a mapping)
    try:
        with _WithinMeans(numbers):
            model = make(header["method"], header["arguments"])
            model.curves = {n: tuple(d["curve"]) for n, d in header.get("dials", {}).items() if d.get("curve")}
            _ = model.dials  # where a curve that is none shows
    except Exception as error:  # a foreign header may hold anything: words where a constructor needs numbers
        raise errors.WrongModel(
            f"its header does not fit this version: {error}", file=path, help="update tunemri"
        ) from error
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise errors.UnreadableFile(f"not a whole safetensors file ({error})", file=path) from error
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        first = (missing + extra)[0]
        raise errors.WrongModel(
            f"{len(missing)} tensors missing, {len(extra)} unexpected, first {first}", file=path, key="tensors"
        )
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise errors.WrongModel(
                f"found {tuple(value.shape)}, expected {tuple(expected[name].shape)}", file=path, key=name
            )
        if value.is_floating_point() != expected[name].is_floating_point() or value.is_complex():
            raise errors.WrongModel(f"found {value.dtype}, expected {expected[name].dtype}", file=path, key=name)
        if not bool(torch.isfinite(value).all()):
            raise errors.NonFinite(
                "NaN or Inf among the weights", file=path, key=name, help="download or train it again"
            )
    if header.get("sha256", mark := _checksum(header, tensors)) != mark:  # files of earlier versions have none
        raise errors.UnreadableFile(
            "changed after it was saved: the checksum in its header differs",
            file=path,
            help="copy or download it again",
        )
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in tensors.items()})
    return model.eval()
