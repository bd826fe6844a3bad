"""The search index of a folder of videos: one array of all windows, tied to the weights that made it.

{index}/search.json        version, weights, checkpoint, videos with their numbers of windows, how videos are read
{index}/windows-….npy      (n, E) float16, rows of length 1, read through a memory map
{index}/times-….npy        (n, 2) float64, begin and end of each window in seconds
{index}/features/          the features that the index is built from, which a later run goes on from (docs/features.md)

search.json is replaced last and in one step, so that a search sees the old index or the new one. Nothing in the files
is trusted: arrays are read without pickles, and every number is checked against the arrays.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avion.data.windows import VideoFinder
from avion.errors import UserError
from avion.features import FeatureFolder, read
from avion.files import write_text, written_whole
from avion.reading import open_file, parse_json, read_text

NAME, FEATURES = "search.json", "features"
FORMAT, VERSION = "avion-search", 1
_LARGEST_JSON = 256 << 20  # bytes; a million videos take about a fourth of it
_CURE = "build the index again, with `tools/search_videos.py index` and another --index"
_AT_ONCE = 65536  # rows


@dataclass(frozen=True)
class SearchIndex:
    """An open index.

    Attributes:
        folder: The folder of the index.
        facts: What search.json says beside the videos.
        videos: The names of the videos.
        ends: (v,) int64, for each video the number of the row after its last one.
        windows: (n, E) float16, a memory map.
        times: (n, 2) float64, begin and end of each window in seconds.
    """

    folder: Path
    facts: dict[str, Any]
    videos: list[str]
    ends: np.ndarray
    windows: np.ndarray
    times: np.ndarray

    def video_of(self, row: int) -> int:
        """Return the number of the video that a row belongs to."""
        return int(np.searchsorted(self.ends, row, side="right"))

    def rows_of(self, video: int) -> range:
        """Return the rows of a video."""
        return range(int(self.ends[video - 1]) if video else 0, int(self.ends[video]))

    def finder(self) -> VideoFinder:
        """Return the reader of the videos."""
        facts = self.facts
        return VideoFinder(
            facts["root"], in_store=True, chunk_length=facts["video_chunk_length"], layout=facts["video_layout"]
        )


def build_index(folder: str | os.PathLike, facts: Mapping[str, Any], videos: Sequence[str]) -> SearchIndex:
    """Make an index of the features below `folder`.

    Args:
        folder: The folder of the index. Its folder `features` holds the features of windows.
        facts: What searches need to know: root, video_layout, video_chunk_length, checkpoint, model, model_args,
            norm_style, frames.
        videos: The videos that are to be in the index; those that cannot be read are left out.

    Returns:
        The open index.

    Raises:
        UserError: The features cannot be read or do not exist, or the index cannot be written.
    """
    folder = Path(folder)
    features = read(folder / FEATURES)
    names = [name for name in videos if name in features]
    token = secrets.token_hex(8)
    arrays = {"windows": f"windows-{token}.npy", "times": f"times-{token}.npy"}
    kept, counts, width = _write_arrays(folder, features, names, arrays)
    about = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "weights": features.settings.get("weights"),
        "width": width,
        "window": features.settings.get("window"),
        "stride": features.settings.get("stride"),
        "rows": sum(counts),
        "files": arrays,
        "videos": kept,
        "counts": counts,
    }
    write_text(folder / NAME, json.dumps(about) + "\n", flag="--index", cure="choose another --index")
    for old in [*folder.glob("windows-*.npy"), *folder.glob("times-*.npy")]:
        if old.name not in arrays.values():
            old.unlink(missing_ok=True)  # a search that has it open keeps it until it ends
    return open_index(folder)


def _write_arrays(
    folder: Path, features: FeatureFolder, names: Sequence[str], arrays: Mapping[str, str]
) -> tuple[list[str], list[int], int]:
    """Write both arrays. Return the videos with at least one readable window, their numbers of windows, and E."""
    kept, counts, times, width = [], [], [], 0
    shape_at = None
    how = {"flag": "--index", "cure": "choose another --index"}
    with written_whole(folder / arrays["windows"], **how) as file:
        for name in names:
            video = features[name]
            if "clip" not in video.features or video.clip.ndim != 2:
                raise UserError(f"{folder / FEATURES}: {name} has no rows of features; {_CURE}")
            rows, spans = unit_rows(video.clip), np.stack([video.start, video.end], axis=1)
            good = np.isfinite(rows).all(axis=1) & video.valid
            if not good.any():
                continue
            if not width:
                width = rows.shape[1]
                shape_at = _header(file, 0, width)
            if rows.shape[1] != width:
                raise UserError(f"{folder / FEATURES}: {name} has {rows.shape[1]} channels, others {width}; {_CURE}")
            file.write(rows[good].astype("<f2").tobytes())
            kept.append(name)
            counts.append(int(good.sum()))
            times.append(spans[good])
        if not kept:
            raise UserError(f"--index {folder}: no window of any video can be read; the lines above say why")
        file.seek(0)
        assert _header(file, sum(counts), width) == shape_at, "the header has kept its length"
    with written_whole(folder / arrays["times"], **how) as file:
        np.save(file, np.concatenate(times).astype("<f8"), allow_pickle=False)
    return kept, counts, width


def _header(file, count: int, width: int) -> int:
    """Write the header of a .npy file, which leaves room for a larger count. Return its length."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (count, width)})
    return file.tell()


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Bring rows (n, E) to length 1, in float32. A row of zeros becomes NaN."""
    rows = np.asarray(rows, dtype=np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def open_index(folder: str | os.PathLike) -> SearchIndex:
    """Open an index.

    Args:
        folder: The folder of the index.

    Returns:
        The index.

    Raises:
        UserError: There is no index, it is of another version, or it is damaged.
    """
    folder = Path(folder)
    facts = _read_facts(folder / NAME)
    try:
        videos, counts = facts.pop("videos"), facts.pop("counts")
        rows, width = facts["rows"], facts["width"]
        sound = (
            all(type(n) is int for n in (rows, width))
            and 1 <= width <= 1 << 16
            and isinstance(videos, list)
            and isinstance(counts, list)
            and len(videos) == len(counts)
            and all(_is_name(v) for v in videos)
            and all(type(n) is int and n > 0 for n in counts)
            and sum(counts) == rows > 0
            and len(set(videos)) == len(videos)
        )
        files = facts["files"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / NAME}: {error} is missing or of another type; {_CURE}") from None
    if not sound or not _facts_are_sound(facts):
        raise UserError(f"{folder / NAME}: holds values that cannot be; {_CURE}")
    windows = _array(folder, files, "windows", np.dtype("<f2"), (rows, width))
    times = _array(folder, files, "times", np.dtype("<f8"), (rows, 2))
    return SearchIndex(folder, facts, videos, np.cumsum(counts, dtype=np.int64), windows, times)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB, which no index has; {_CURE}")
        facts = parse_json(read_text(path), nan=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; make the index with `tools/search_videos.py index FOLDER --checkpoint C`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path}: is no search index; {_CURE}")
    if facts.get("version") != VERSION:
        raise UserError(
            f"{path}: is of version {str(facts.get('version'))[:20]}, this program reads {VERSION}; {_CURE}"
        )
    return facts


def _facts_are_sound(facts: Mapping[str, Any]) -> bool:
    texts = all(isinstance(facts.get(name), str) for name in ("root", "video_layout", "checkpoint", "weights"))
    whole = all(type(facts.get(name)) is int and facts[name] >= 1 for name in ("frames", "video_chunk_length"))
    numbers = all(
        isinstance(facts.get(name), int | float) and 0 < facts[name] < math.inf for name in ("window", "stride")
    )
    args = facts.get("model_args")
    named = facts.get("model") is None or isinstance(facts["model"], str)
    style = isinstance(facts.get("norm_style"), str)
    return texts and whole and numbers and named and style and isinstance(args, list) and all(map(_is_text, args))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    """Return whether a value is the name of a video below the root."""
    if not isinstance(value, str) or not value or "\0" in value or "\\" in value or len(value) > 4096:
        return False
    return all(part not in ("", ".", "..") for part in value.split("/"))


def _array(folder: Path, files: object, name: str, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    file = files.get(name) if isinstance(files, dict) else None
    if not isinstance(file, str) or not file or "/" in file or "\0" in file or not file.startswith(f"{name}-"):
        raise UserError(f"{folder / NAME}: names the file {str(file)[:80]!r}; {_CURE}")
    try:
        open_file(folder / file).close()  # a named pipe would be waited for
        found = np.load(folder / file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{folder / file}: no such file; {_CURE}") from None
    except OSError as error:
        raise UserError(f"{folder / file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # NumPy raises several kinds for files that are no arrays
        raise UserError(f"{folder / file}: is no array ({str(error).splitlines()[0][:60]}); {_CURE}") from None
    if found.dtype != dtype or found.shape != shape or not found.flags.c_contiguous:
        raise UserError(f"{folder / file}: is {found.dtype} {found.shape}, expected {dtype} {shape}; {_CURE}")
    return found
