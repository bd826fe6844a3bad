"""Read the features that `tools/extract_features.py` wrote, into shards or into a file per video.

    from avion.features import read
    for name, video in read("features/").items():
        print(name, video.clip.shape, video.start[0], video.end[-1], video.valid.all())

The files are not trusted: arrays are read without pickles, and no member of a file may be larger than the file.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avion.constants import FEATURE_KINDS
from avion.errors import UserError
from avion.json_lines import read_json_lines
from avion.reading import open_file, parse_json, read_npy, read_text

_CURE = "extract the features again, into another folder"
_LARGEST_SETTINGS = 1 << 20  # bytes


@dataclass(frozen=True)
class VideoFeatures:
    """The features of a video: a row per window in the order of time, or a row per clip in the order of the list.

    Attributes:
        features: Arrays (n, …) by kind: "clip" (n, E), "frame" (n, T, D), "spatial" (n, N, T, D). The rows that could
            not be read are NaN.
        start: (n,) float64, the time at which each row begins, in seconds.
        end: (n,) float64, the time at which each row ends, in seconds. It is NaN where the list has no end, which only
            happens in a folder of shards.
        valid: (n,) bool, whether the row could be read.
        ids: The narration_ids of the rows, where the list has them.
    """

    features: dict[str, np.ndarray]
    start: np.ndarray
    end: np.ndarray
    valid: np.ndarray
    ids: tuple[str, ...] | None = None

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["features"][name]
        except KeyError:
            raise AttributeError(f"there are no features {name!r} here") from None


def read(folder: str | os.PathLike) -> FeatureFolder:
    """Open a folder of features. A video's arrays are read when the video is asked for.

    Args:
        folder: The `--output-dir` of `tools/extract_features.py`.

    Returns:
        A mapping from the names of the videos to their `VideoFeatures`. Videos that could not be read at all are not
        in it, but in its `errors`.

    Raises:
        UserError: The folder holds no features, or they are damaged.
    """
    return FeatureFolder(Path(folder))


class FeatureFolder(Mapping[str, VideoFeatures]):
    """The features in a folder, which `read` returns: a mapping from the names of the videos to their features.

    Attributes:
        settings: What the features depend on, from `settings.json`.
        errors: For each video of which nothing could be read, what is wrong with it, by the name of the video.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = read_settings(folder / "settings.json")
        self.errors: dict[str, str] = {}
        self._entries: dict[str, Any] = {}
        lines = read_json_lines(folder / "index.jsonl", cure=_CURE).objects
        if self.settings.get("per_video"):
            for entry in lines:
                self._add_video(entry)
        else:
            rows = {e["row"]: e for e in lines if type(e.get("row")) is int}  # of several lines, the last one counts
            for _, entry in sorted(rows.items()):
                self._entries.setdefault(str(entry.get("video")), []).append(entry)

    def _add_video(self, entry: dict[str, Any]) -> None:
        name = str(entry.get("video"))
        self.errors.pop(name, None)
        self._entries.pop(name, None)
        if "error" in entry:
            self.errors[name] = str(entry["error"])
        else:
            self._entries[name] = entry

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> VideoFeatures:
        entry = self._entries[name]
        return self._of_shards(entry) if isinstance(entry, list) else self._of_file(entry)

    def _of_file(self, entry: dict[str, Any]) -> VideoFeatures:
        path = self._below(entry.get("file"))
        arrays = read_arrays(path)
        if set(arrays) == {""}:  # a bare array; its times lie beside it
            kinds = self.settings.get("features")
            kind = kinds[0] if isinstance(kinds, list) and kinds else "clip"
            arrays = {str(kind): arrays[""], **read_arrays(self._below(entry.get("times")))}
        return _checked(path, arrays)

    def _of_shards(self, entries: list[dict[str, Any]]) -> VideoFeatures:
        parts: dict[str, list[np.ndarray]] = {}
        shards: dict[Path, dict[str, np.ndarray]] = {}
        for entry in entries:
            path, position = self._below(entry.get("shard")), entry.get("position")
            if path not in shards:
                shards[path] = {k: v for k, v in read_arrays(path).items() if k in FEATURE_KINDS}
            for kind, values in shards[path].items():
                if type(position) is not int or not 0 <= position < len(values):
                    raise UserError(f"{path}: the index names position {position} of {len(values)}; {_CURE}")
                parts.setdefault(kind, []).append(values[position])
        if not parts or any(len(values) != len(entries) for values in parts.values()):
            raise UserError(f"{self.folder}: has shards of different kinds of features; {_CURE}")
        try:
            times = [[np.nan if e.get(key) is None else float(e[key]) for e in entries] for key in ("start", "end")]
        except (TypeError, ValueError):
            raise UserError(f"{self.folder / 'index.jsonl'}: holds a time that is no number; {_CURE}") from None
        valid = np.array(["error" not in e for e in entries])
        ids = tuple(str(e["id"]) for e in entries) if all(e.get("id") is not None for e in entries) else None
        start, end = np.array(times, dtype=np.float64)
        return VideoFeatures({kind: np.stack(values) for kind, values in parts.items()}, start, end, valid, ids)

    def _below(self, name: object) -> Path:
        """Return the path of a file of this folder; a name that leads out of the folder is a UserError."""
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise UserError(f"{self.folder / 'index.jsonl'}: names the file {str(name)[:80]!r}; {_CURE}")
        return self.folder / name


def read_settings(path: Path, cure: str = _CURE) -> dict[str, Any]:
    """Read a settings file: one JSON object.

    Args:
        path: The file.
        cure: What the user can do about a file that holds something else; the error message ends with it.

    Returns:
        The settings.

    Raises:
        UserError: There is no such file, or it holds something else.
    """
    try:
        size = path.stat().st_size
        found = parse_json(read_text(path)) if size <= _LARGEST_SETTINGS else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the --output-dir of tools/extract_features.py") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        found = None
    if size > _LARGEST_SETTINGS:
        raise UserError(f"{path}: is too large for settings; {cure}")
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not the settings of an extraction; {cure}")
    return found


def _checked(path: Path, arrays: dict[str, np.ndarray]) -> VideoFeatures:
    features = {name: values for name, values in arrays.items() if name in FEATURE_KINDS}
    times = [arrays.get(name) for name in ("start", "end", "valid")]
    count = len(next(iter(features.values()), ()))
    if not features or any(t is None or t.shape != (count,) for t in times) or arrays["valid"].dtype != bool:
        raise UserError(f"{path}: does not hold features with their start, end and valid; {_CURE}")
    if any(values.ndim < 2 or len(values) != count for values in features.values()):
        raise UserError(f"{path}: has not a feature for each of {count} rows; {_CURE}")
    ids = tuple(arrays["id"].tolist()) if "id" in arrays else None
    return VideoFeatures(features, arrays["start"], arrays["end"], arrays["valid"], ids)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz, .safetensors, .npy or .pt file.

    Args:
        path: The file.

    Returns:
        The arrays by name; the name of a bare array is "". An array of bfloat16 becomes float32, since NumPy has no
        bfloat16.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".npz":
            return _npz(path)
        if path.suffix == ".npy":
            with open_file(path) as file:
                return {"": read_npy(file, path.stat().st_size)}
        import torch

        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = {"": torch.load(path, map_location="cpu", weights_only=True)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # each library has errors of its own for files that are none of its kind
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not a file of features ({str(error).splitlines()[0][:80]}); {_CURE}") from None
    if not all(isinstance(values, torch.Tensor) for values in tensors.values()):
        raise UserError(f"{path}: does not hold tensors; {_CURE}")
    return {
        name: (values.float() if values.dtype == torch.bfloat16 else values).numpy() for name, values in tensors.items()
    }


def _npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():  # `numpy.savez` does not compress: a small file cannot hold a large array
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                raise UserError(f"{path}: {member.filename[:40]} is compressed; {_CURE}")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
