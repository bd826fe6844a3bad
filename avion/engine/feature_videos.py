"""Features on disk in a file per video, as code for temporal localisation reads them.

{folder}/settings.json      what the features depend on; a run with other settings is refused
{folder}/{video}.npz, …     .npz or .safetensors: an array (n, …) per kind, and `start`, `end` (n,) float64 in seconds,
                            `valid` (n,) bool and, where the list has ids, `id` (n,); .npy or .pt: the features alone
{folder}/times/{video}.npz  beside .npy and .pt: `start`, `end`, `valid`, `id`
{folder}/index.jsonl        a JSON line per video: video, file, times, rows, unreadable (how many rows), spans (a digest
                            of the list's clips), errors (the first of them); or video and error

Rows that cannot be read keep their place: they are NaN, and False in `valid`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from avion.data.video import VIDEO_EXTENSIONS
from avion.errors import UserError
from avion.files import append_lines, partial_file
from avion.json_lines import JsonLines

from .feature_folder import TEXTS, WHOLE, FeatureFolder, Part, is_whole
from .feature_shards import blank_rows, save_tensors

BARE_FORMATS = ("npy", "pt")  # a file of these holds one array, without its times
TIMES = "times"
_SHOWN = 3  # errors of a video that its index line names


def file_stem(video: str) -> str:
    """Return the path of a video's features below the folder, without extension.

    It is the path of the video without its extension. The participant of EPIC-KITCHENS, which the rest of the name
    repeats, is left out: P01/P01_01 becomes P01_01, the name that localisation code knows.

    Args:
        video: The name of the video.

    Returns:
        The path.
    """
    stem, extension = os.path.splitext(video)
    path = PurePosixPath(stem if extension.lower() in VIDEO_EXTENSIONS else video)
    parts = [part for part in path.parts if part not in ("/", "..")]
    if len(parts) > 1 and parts[-1].startswith(f"{parts[-2]}_"):
        del parts[-2]
    return "/".join(parts)


class VideoFiles(FeatureFolder):
    """The files of the features of a list of videos.

    Args:
        folder: The folder.
        videos: The names of the videos.
        digests: For each video, a text that changes with what its rows depend on besides the settings; "" where they
            depend on nothing else.
        settings: As in `FeatureFolder`, with `format`.
        part: As in `FeatureFolder`; the units are videos.
        retry: Whether videos with rows that could not be read count as unfinished.

    Attributes:
        errors: For each video of this part, what could not be read, by the name of the video; "" where all could be
            read.

    Raises:
        UserError: As in `FeatureFolder`, and where two videos would have the same file.
    """

    extensions = (".npz", ".safetensors", ".npy", ".pt")

    def __init__(
        self,
        folder: str | os.PathLike,
        videos: Sequence[str],
        digests: Sequence[str],
        settings: Mapping[str, Any],
        part: Part = WHOLE,
        retry: bool = False,
    ):
        self.videos, self.digests, self.retry = videos, digests, retry
        self.format = settings["format"]
        self.errors: dict[str, str] = {}
        self._number = {video: i for i, video in enumerate(videos)}
        self._finished: set[int] = set()
        stems: dict[str, str] = {}
        for video in videos:
            stem = file_stem(video)
            if stem == TEXTS:
                raise UserError(
                    f"video {video}: its features would take the name of the sentences' features; rename it"
                )
            if not stem or stems.setdefault(stem, video) != video:
                raise UserError(
                    f"videos {stems.get(stem, '')} and {video}: would both be written to {stem}.{self.format}; put "
                    "one of them into another list and --output-dir"
                )
        super().__init__(folder, settings, part)

    def path(self, number: int) -> Path:
        """Return the path of the features of a video.

        Args:
            number: The number of the video in the list.

        Returns:
            The path.
        """
        return self.folder / f"{file_stem(self.videos[number])}.{self.format}"

    def times_path(self, number: int) -> Path:
        """Return the path of the times that lie beside a bare array.

        Args:
            number: The number of the video in the list.

        Returns:
            The path.
        """
        return self.folder / TIMES / f"{file_stem(self.videos[number])}.npz"

    def own(self) -> list[int]:
        """Return the numbers of the videos of this part."""
        return [i for i in range(len(self.videos)) if self.part.has(i)]

    def todo(self) -> list[int]:
        """Return the numbers of the videos of this part that are not finished."""
        return [i for i in self.own() if i not in self._finished]

    def write(
        self,
        number: int,
        features: Mapping[str, torch.Tensor],
        spans: np.ndarray,
        errors: Sequence[str],
        ids: Sequence[str] | None = None,
    ) -> None:
        """Write the file of a video and its line of the index.

        Args:
            number: The number of the video.
            features: By kind, the features (n, …) of all rows. Those of unreadable rows do not count.
            spans: (n, 2) float64, begin and end of each row in seconds.
            errors: By row, why it cannot be read, or "".
            ids: The ids of the rows, where the list has them.

        Raises:
            UserError: The files cannot be written.
        """
        valid = torch.tensor([not error for error in errors])
        blanked = {kind: blank_rows(values, valid) for kind, values in features.items()}
        times = {"start": torch.from_numpy(spans[:, 0].copy()), "end": torch.from_numpy(spans[:, 1].copy())}
        times["valid"] = valid
        path, told = self.path(number), [error for error in errors if error]
        entry: dict[str, Any] = {
            "video": self.videos[number],
            "file": path.relative_to(self.folder).as_posix(),
            "rows": len(errors),
            "unreadable": len(told),
            "spans": self.digests[number],
        }
        if told:
            entry["errors"] = list(dict.fromkeys(told))[:_SHOWN]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.format in BARE_FORMATS:
                entry["times"] = f"{TIMES}/{file_stem(self.videos[number])}.npz"
                (self.folder / entry["times"]).parent.mkdir(parents=True, exist_ok=True)
                save_file_of(self.folder / entry["times"], times, "npz", ids)
                save_file_of(path, blanked, self.format)
            else:
                save_file_of(path, {**blanked, **times}, self.format, ids)
            append_lines(self.index, [json.dumps(entry)])
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}); free space, then go on") from e
        self._done(number, entry)

    def fail(self, number: int, error: str) -> None:
        """Note that nothing of a video can be read.

        Args:
            number: The number of the video in the list.
            error: What is wrong with the video.

        Raises:
            UserError: The index cannot be written.
        """
        entry = {"video": self.videos[number], "error": error, "spans": self.digests[number]}
        try:
            append_lines(self.index, [json.dumps(entry)])
        except OSError as e:
            raise UserError(f"{self.index}: cannot be written ({e.strerror}); free space, then go on") from e
        self._done(number, entry)

    def _done(self, number: int, entry: Mapping[str, Any]) -> None:
        self._finished.add(number)
        video = self.videos[number]
        if "error" in entry:
            self.errors[video] = str(entry["error"])
        elif entry.get("unreadable"):
            first = next(iter(entry.get("errors") or [""]))
            self.errors[video] = f"{entry['unreadable']} of {entry['rows']} rows, such as: {first}"
        else:
            self.errors.pop(video, None)

    def _read_index(self, lines: JsonLines) -> list[dict[str, Any]]:
        """Find the finished videos: a video is finished if its line exists, with the same clips of the list, and its
        file.

        The lines of videos that are not in this list stay: a list may grow, and lists may share a folder.
        """
        entries: dict[str, dict[str, Any]] = {}
        for entry in lines.objects:
            if isinstance(entry.get("video"), str):  # of lines for the same video, the last one counts
                entries[entry["video"]] = entry
        kept = []
        for video, entry in entries.items():
            number = self._number.get(video)
            if number is None or not self.part.has(number):
                kept.append(entry)
                continue
            faulty = "error" in entry or bool(entry.get("unreadable"))
            there = "error" in entry or (
                is_whole(self.path(number)) and (self.format not in BARE_FORMATS or is_whole(self.times_path(number)))
            )
            if there and entry.get("spans") == self.digests[number] and not (faulty and self.retry):
                self._done(number, entry)
                kept.append(entry)
        return kept


def save_file_of(path: Path, arrays: Mapping[str, torch.Tensor], format: str, ids: Sequence[str] | None = None) -> None:
    """Write arrays to a file of one of FEATURE_FORMATS, whole or not at all.

    Args:
        path: The file.
        arrays: The arrays by name; .npy and .pt take one array.
        format: One of FEATURE_FORMATS.
        ids: The ids of the rows, where the list has them.
    """
    with partial_file(path) as partial:
        if format == "npz":
            named = {name: values.numpy() for name, values in arrays.items()}
            if ids is not None:
                named["id"] = np.array(list(ids), dtype=np.str_)
            with open(partial, "wb") as file:
                np.savez(file, **named)
        elif format == "safetensors":
            save_tensors(partial, arrays, format)
        else:
            (values,) = arrays.values()
            with open(partial, "wb") as file:
                if format == "npy":
                    np.save(file, values.numpy())
                else:
                    torch.save(values.clone(), file)
