"""Files of weights are read and written here, without ever running what is inside of them.

An address is a local path, a URL such as `s3://bucket/file`, or `hf:owner/repo/file` (Hugging Face Hub). What lies
elsewhere is read through a local cache. Files of safetensors are
read by safetensors, TorchScript archives by `avion.weights.torchscript`, and all other files by
`torch.load(weights_only=True)` with three additions: `argparse.Namespace` (upstream's `args`), plain numpy numbers
(upstream's `best_acc1`), and inert stand-ins for foreign objects in `args` (see `avion.weights.foreign`). Tensors stay
memory-mapped where the format allows it, so that the optimizer state beside the weights is not copied into memory.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from avion.errors import UserError
from avion.files import partial_file, written_whole
from avion.reading import open_file, parse_json
from avion.remote import fetch, is_remote
from avion.safe_pickle import Refused

from .foreign import Scout, check_sizes, refuse_outside_args, scout, scout_archive
from .integrity import check_integrity
from .torchscript import archive_root, read_torchscript

HF_PREFIX = "hf:"
_METADATA_KEY = "avion"


# --- addresses -------------------------------------------------------------------------------


def resolve_path(path: str | os.PathLike) -> Path:
    """Find the local file behind a path, a URL or an `hf:owner/repo/file` address.

    A file that is already in the hub's cache is used without a question to the hub.

    Args:
        path: The path or the address.

    Returns:
        The path of a local file.

    Raises:
        UserError: The file is missing, the address is malformed, or neither the cache nor the hub has the file.
    """
    text = os.fspath(path)
    if text.startswith(HF_PREFIX):
        return _resolve_hub_address(text)
    if is_remote(text):
        return _resolve_url(text)
    local = Path(text).expanduser()
    if local.is_dir():
        raise UserError(f"{text}: is a folder, a checkpoint file is needed (for example {text}/checkpoint.pt)")
    if not local.is_file():
        raise UserError(f"{text}: no such file (give a path or hf:owner/repo/file)")
    return local


def _resolve_url(address: str) -> Path:
    try:
        return Path(fetch(address))
    except FileNotFoundError:
        raise UserError(f"{address}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{address}: cannot be read ({error.strerror or error})") from error


def _resolve_hub_address(address: str) -> Path:
    parts = address.removeprefix(HF_PREFIX).split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts:
        raise UserError(f"{address}: not a hub address, expected hf:owner/repo/file")
    return hub_file("/".join(parts[:2]), ["/".join(parts[2:])])


def hub_file(repo: str, filenames: list[str], flag: str = "") -> Path:
    """Return the first of several files that a repository of the hub has: from the local cache, or else by a download.

    Args:
        repo: The repository, as owner/name.
        filenames: The names of the files, in the order in which they are tried.
        flag: The flag that takes the path of such a file, for the message.

    Returns:
        The path of the file in the hub's cache.

    Raises:
        UserError: No file can be had. Without a network the error comes within seconds, where the hub's own client
            would retry for half a minute.
    """
    import huggingface_hub as hub
    import huggingface_hub.constants
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for name in filenames:
        try:
            return Path(hub.hf_hub_download(repo, name, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        except ValueError as error:  # the hub's word on a malformed owner, repo or file name
            raise UserError(f"hf:{repo}/{name}: {_one_line(error)}") from error
    wanted = " or ".join(filenames)
    give = f"give its path with {flag}" if flag else "give its path"
    cure = (
        f"download it from {hub.constants.ENDPOINT}/{repo} elsewhere and {give}, or copy that machine's hub cache "
        f"(models--{repo.replace('/', '--')}) into {hub.constants.HF_HUB_CACHE}"
    )
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"hf:{repo}: {wanted} is not in the cache and HF_HUB_OFFLINE is set: {cure}")
    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # requests' or httpx's, by the hub's version
        raise UserError(f"hf:{repo}: {wanted} is not in the cache and the hub cannot be reached: {cure}") from error
    problem = ""
    for name in filenames:
        try:
            return Path(hub.hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:
            raise UserError(f"hf:{repo}: {name} cannot be downloaded: {cure}") from error
        except EntryNotFoundError as error:
            problem = f"the repository has no file {wanted} ({_one_line(error)})"
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"hf:{repo}/{name}: {_one_line(error)}") from error
    raise UserError(f"hf:{repo}: {problem}")


# --- reading ---------------------------------------------------------------------------------


_MOST_READINGS = 10  # of a file that a run replaces meanwhile
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _NumpyDtype:
    """Stands for `numpy.dtype` while a checkpoint is read: it remembers the code of the type and nothing else."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if code in _NUMBERS else None
        self.byteorder = "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.byteorder = state[1]


def _numpy_number(dtype: Any, data: Any = b"") -> float | int | bool:
    """Stands for numpy's constructor of scalars: it returns a plain Python number."""
    if not isinstance(dtype, _NumpyDtype) or dtype.code is None or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is not a plain number")
    return np.frombuffer(data, np.dtype(dtype.byteorder + dtype.code), count=1)[0].item()


_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
]


def extend_torch_load() -> None:
    """Let `torch.load` itself, in the rest of this process, read what upstream's checkpoints hold beside tensors: the
    flags as `argparse.Namespace`, and the numbers of numpy.
    """
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # numpy 1's and numpy 2's
    dtypes = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    torch.serialization.add_safe_globals([argparse.Namespace, *dtypes, *((scalar, name) for name in names)])


@contextlib.contextmanager
def _only_these_globals(names: list[Any]) -> Iterator[None]:
    """Let `torch.load` read these names only, whatever else this process may have allowed, until the block is left."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(names)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_checkpoint(path: str | os.PathLike, *, verify: bool = True) -> dict[str, Any]:
    """Read the contents of a checkpoint.

    A safetensors file gives `state_dict` and, where this project wrote the file, the fields beside the weights (such as
    `model_config`). A TorchScript archive gives `state_dict`. Any other file gives what `torch.save` put into it, which
    must be a dict.

    Args:
        path: The path, or an `hf:owner/repo/file` address.
        verify: Whether a file that is not what was written is refused (`avion.weights.integrity`).

    Returns:
        The contents by field; tensors are on the CPU, memory-mapped where the format allows it.

    Raises:
        UserError: The file is missing, empty, cut short, damaged or of an unknown format, or asks for anything but
            data. The message is one line: which file, what was found, what to do.
    """
    local = resolve_path(path)
    try:
        contents = _read_whole(local, verify)
    except Exception as error:  # hostile bytes can raise anything from within the readers
        line = str(error) if isinstance(error, UserError) else _why_unreadable(local, error)
        if is_remote(path):  # the local copy says nothing to people
            line = line.replace(str(local), os.fspath(path))
        raise UserError(line) from error
    if not isinstance(contents, dict):
        raise UserError(f"{local}: holds a {type(contents).__name__}, a checkpoint is a dict with a state_dict in it")
    return contents


def _read_whole(path: Path, verify: bool) -> Any:
    """Read the contents of a file, and compare them with the checksums in it.

    The libraries open the file by its path once more. A run that goes on may have written its next checkpoint in
    between; then what was checked is not what was read, and both are done anew.
    """
    for _ in range(_MOST_READINGS):
        with open_file(path) as file:
            contents = _read(file, path)
            if verify:
                check_integrity(file, path)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return contents
    raise UserError(f"{path}: was replaced {_MOST_READINGS} times while it was read; read it when its run has ended")


def _read(file: IO[bytes], path: Path) -> Any:
    """Read the contents of a file that is open for the checks. The libraries open it by its path once more."""
    is_zip = zipfile.is_zipfile(file)
    _refuse_lookalikes(file, path, is_zip)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not is_zip:
        return _torch_load(path, scout(file), mmap=False)  # files from before PyTorch 1.6
    with zipfile.ZipFile(file) as archive:
        _check_archive(archive, path)
        if archive_root(archive) is not None:
            return {"state_dict": read_torchscript(archive, path)}
        found = scout_archive(archive)
    return _torch_load(path, found, mmap=True)


def _torch_load(path: Path, found: Scout, *, mmap: bool) -> Any:
    try:
        contents = _load_weights_only(path, [], mmap=mmap)
    except pickle.UnpicklingError:
        known = {name for _, name in _SAFE_GLOBALS[1:]} | {"argparse.Namespace"}
        stand_ins = found.stand_ins(known)
        if not stand_ins:
            raise
        contents = _load_weights_only(path, stand_ins, mmap=mmap)
        refuse_outside_args(contents, found, path)
    check_sizes(contents)
    return contents


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse a zip that states more than its bytes hold: PyTorch stores entries one after the other, uncompressed."""
    # The code of TorchScript is compressed, and never read here.
    entries = [entry for entry in archive.infolist() if "/code/" not in entry.filename]
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise Refused(f"a compressed entry {packed.filename!r}")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise Refused("entries that are longer than the file")


# PyTorch keeps the names that it allows for the whole process: one file at a time.
_LOADING = threading.Lock()


def _load_weights_only(path: Path, stand_ins: list[Any], *, mmap: bool) -> Any:
    with _LOADING, warnings.catch_warnings(), _only_these_globals([*_SAFE_GLOBALS, *stand_ins]):
        # Only hostile and foreign files have another pickle protocol: they get one line, the error's.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)


def _refuse_lookalikes(file: IO[bytes], path: Path, is_zip: bool) -> None:
    """Refuse files that are not checkpoints but are often found under the name of one."""
    file.seek(0)
    head = file.read(64)
    if not head:
        raise UserError(f"{path}: the file is empty: fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the weights: run `git lfs pull` where it was cloned")
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path}: a web page, not a checkpoint: fetch the file itself")
    if head.startswith(b"PK\x03\x04") and path.suffix != ".safetensors" and not is_zip:
        raise UserError(f"{path}: the file is cut short ({path.stat().st_size} bytes): fetch or write it again")


def _why_unreadable(path: Path, error: Exception) -> str:
    text = _one_line(error)
    wanted = re.search(r"(?:GLOBAL|function) <?(?:built-in function )?([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and wanted:
        return (
            f"{path}: refused, the pickle asks for {wanted.group(1)}, which is code and not weights: "
            "get the checkpoint from its authors, or have them save the state_dict alone"
        )
    if isinstance(error, Refused):
        return f"{path}: refused, it holds {text[:160]}: get the checkpoint from its authors"
    # PyTorch's own text on a malformed pickle tells the user to switch the safety off.
    detail = "malformed pickle" if isinstance(error, pickle.UnpicklingError) else text[:160] or "it ends early"
    return f"{path}: cannot be read, cut short or no checkpoint ({detail}): fetch or write it again"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        contents: dict[str, Any] = {"state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    if _METADATA_KEY in metadata:
        ours = parse_json(metadata[_METADATA_KEY])
        if not isinstance(ours, dict):
            raise UserError(f"{path}: metadata field {_METADATA_KEY!r} is no JSON object")
        contents |= {key: ours[key] for key in ("model_config", "preprocess", "classifier") if key in ours}
    return contents


def checkpoint_state_dict(checkpoint: Mapping[str, Any], path: str | os.PathLike = "checkpoint") -> dict[str, Tensor]:
    """Return the weights by name: `checkpoint["state_dict"]`, or the checkpoint itself if it is a bare state dict.

    Args:
        checkpoint: The contents of a checkpoint.
        path: Where the contents come from, for messages.

    Returns:
        The dense tensors under the names that the file gives them.

    Raises:
        UserError: There are no weights, or something among them is not a dense tensor.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path}: field state_dict holds no weights")
    foreign = [k for k, v in weights.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if foreign:
        found = ", ".join(repr(k) for k in foreign[:4])
        raise UserError(f"{path}: no state_dict among its fields, and not all of them are weights (found {found})")
    for name, value in weights.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{path}: {name} is no dense tensor ({value.layout}, {value.device})")
        # A stride of 0 lets a few bytes claim any shape, and a model of that shape would be built.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} has shape {tuple(value.shape)} but not the data for it")
    return dict(weights)


# --- writing ---------------------------------------------------------------------------------


def write_safetensors(weights: Mapping[str, Tensor], path: str | os.PathLike, **fields: Any) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        weights: The tensors by name.
        path: The file; its folder must exist.
        fields: What stands beside the weights (such as `model_config` and `preprocess`), as JSON in the metadata.

    Raises:
        UserError: The file cannot be written.
    """
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(fields)}
    dense = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    with partial_file(_in_folder(path), cure=_CURE) as partial:
        safetensors.torch.save_file(dense, partial, metadata)


def write_pt(contents: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a file with `torch.save`, whole or not at all: a reader finds the old file or the complete new one.

    Args:
        contents: The fields of the checkpoint.
        path: The file; its folder must exist.

    Raises:
        UserError: The file cannot be written.
    """
    with written_whole(_in_folder(path), cure=_CURE) as file:
        torch.save(dict(contents), file)


_CURE = "choose another place"


def _in_folder(path: str | os.PathLike) -> Path:
    target = Path(path)
    if not target.parent.is_dir():
        raise UserError(f"{target}: folder {target.parent} does not exist")
    return target
