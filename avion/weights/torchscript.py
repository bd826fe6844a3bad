"""Reads weights out of a TorchScript archive (OpenAI's original CLIP files) without running the archive.

`torch.load(weights_only=True)` refuses such archives, and `torch.jit.load` compiles the code inside and can execute it.
The archive is a zip: `NAME/data.pkl` holds the tree of modules as a pickle, and `NAME/data/KEY` holds the raw bytes of
each tensor. Here the restricted unpickler, which knows a handful of names, reads the pickle; every module of the
archive becomes an inert bag of attributes; and the code is never looked at.
"""

import collections
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avion.errors import UserError
from avion.safe_pickle import Unpickler, checkpoint_opcodes

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """Stands for an object of the archive, whatever its class is: only its attributes are kept."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # raises where the storage is too short


def _no_items(*items: Any) -> collections.OrderedDict[Any, Any]:
    if items:
        raise pickle.UnpicklingError("an OrderedDict of pairs")  # PyTorch fills it afterwards
    return collections.OrderedDict()


def _first(value: Any, *_: Any) -> Any:
    """Typed lists and dicts are wrapped in a call that only names their type."""
    return value


class _ArchiveUnpickler(Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        entry = archive.getinfo(f"{root}/data.pkl")
        all_bytes = sum(entry.file_size for entry in archive.infolist())
        super().__init__(archive.open(entry), entry.file_size, checkpoint_opcodes(all_bytes))
        self.archive = archive
        self.root = root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch.jit._pickle":
            return _first
        if (module, name) == ("collections", "OrderedDict"):
            return _no_items
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, numel = pid
        if kind != "storage" or dtype not in _STORAGES.values():
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.root}/data/{key}")
            if not 0 <= numel <= entry.file_size // dtype.itemsize:
                raise EOFError(f"tensor {key!r} is shorter than its {numel} elements")
            data = bytearray(self.archive.read(entry))
            self.storages[key] = torch.frombuffer(data, dtype=dtype, count=numel) if numel else torch.empty(0)
        return self.storages[key]


def archive_root(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the folder inside the zip if it is a TorchScript archive, else None.

    Files of `torch.save` have no constants.pkl.
    """
    roots = [name.rpartition("/")[0] for name in archive.namelist() if name.endswith("/constants.pkl")]
    return min(roots, key=len) if roots else None


def read_torchscript(archive: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    """Read the parameters and buffers of the archived module.

    Args:
        archive: The open archive.
        path: The path of the archive, for messages.

    Returns:
        The tensors by their dotted names.

    Raises:
        UserError: The archive holds anything but modules and tensors.
    """
    root = archive_root(archive)
    if root is None:
        raise UserError(f"{path}: not a TorchScript archive")
    module = _ArchiveUnpickler(archive, root).load()
    if not isinstance(module, _Module):
        raise UserError(f"{path}: a TorchScript archive without a module in it")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    todo = [("", module)]
    while todo:
        prefix, node = todo.pop()
        if id(node) in seen:  # hostile archives can be cyclic
            continue
        seen.add(id(node))
        for name, value in node.attributes.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                todo.append((f"{prefix}{name}.", value))
    # OpenAI keeps three sizes as 0-d integer buffers: they are no weights.
    return {k: v for k, v in tensors.items() if v.is_floating_point() or math.prod(v.shape) > 1}
