"""What is to be prepared, and where it goes: the videos below a folder, their names, the files that they become."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from avion.errors import UserError

from .layout import LAYOUTS
from .prepare_encode import Encoding

DATASETS = ("ego4d", "ek100", "egoschema", "folder")
DEFAULT_LAYOUT = {"ego4d": "avion", "ek100": "avion", "egoschema": "whole", "folder": "whole"}
RAW_EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
)  # fmt: skip
_EK100_VIDEO = re.compile(r"(P\d{2})_\d{2,3}")


@dataclass(frozen=True)
class Settings:
    """How videos are prepared.

    dataset: one of DATASETS, which says how the files are named. layout: one of LAYOUTS; "" for the dataset's own.
    chunk_length: seconds per chunk, of no meaning for whole videos. short_side: pixels of the shorter side, even.
    """

    dataset: str = "folder"
    layout: str = ""
    chunk_length: int = 15
    short_side: int = 288
    encoding: Encoding = field(default_factory=Encoding)

    def __post_init__(self):
        if self.dataset not in DATASETS:
            raise UserError(f"--dataset {self.dataset}: is not one of {', '.join(DATASETS)}")
        if not self.layout:
            object.__setattr__(self, "layout", DEFAULT_LAYOUT[self.dataset])
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout {self.layout}: is not one of {', '.join(LAYOUTS)}")
        if self.chunk_length < 1:
            raise UserError(f"--chunk-length {self.chunk_length}: must be a whole number of seconds, at least 1")
        if self.short_side < 16 or self.short_side % 2:
            raise UserError(f"--short-side {self.short_side}: must be an even number of pixels, at least 16")

    @property
    def extension(self) -> str:
        """Of the written files: EPIC-KITCHENS writes it in capitals."""
        return ".MP4" if self.dataset == "ek100" else ".mp4"

    @property
    def chunked(self) -> bool:
        return self.layout != "whole"

    def chunk_of(self, time: int, ticks: int) -> int:
        """The number of the chunk in which a frame lies that is shown from `time` (ticks) on; ticks: per second."""
        return time // (self.chunk_length * ticks) if self.chunked else 0

    def target(self, name: str) -> str:
        """What the video of this name becomes, relative to the target: a folder of chunks, or one file."""
        return name if self.layout == "vms" else f"{name}{self.extension}"

    def chunk_name(self, chunk: int) -> str:
        """The name of this chunk's file, in the folder of its video."""
        stem = f"{chunk:04d}" if self.layout == "vms" else str(chunk * self.chunk_length)
        return f"{stem}{self.extension}"

    def as_dict(self) -> dict:
        """All of it, in a form that JSON can hold."""
        return {"chunked": self.chunked, **asdict(self)}


@dataclass(frozen=True)
class Raw:
    """A raw video. path: of the file. name: the video's, as annotations have it. size: bytes. stamp: time of the last
    change, in ns."""

    path: str
    name: str
    size: int
    stamp: int


@dataclass(frozen=True)
class Plan:
    """raws: the videos to prepare, ordered by name. refused: (path, why) of files that cannot be."""

    raws: list[Raw]
    refused: list[tuple[str, str]]


def make_plan(source: str | os.PathLike, target: str | os.PathLike, settings: Settings) -> Plan:
    """Find the raw videos below `source`, or the one file that it is. UserError if there are none."""
    source, target = Path(source), Path(os.path.abspath(target))
    if not source.exists():
        raise UserError(f"SOURCE {source}: no such file or folder; give the folder of the raw videos")
    if os.path.abspath(source) == str(target):
        raise UserError(f"TARGET {target}: is SOURCE itself; give another folder, so that the raw videos stay")
    others: dict[str, int] = {}
    by_name: dict[str, Raw] = {}
    refused: list[tuple[str, str]] = []
    for path in sorted(_files(source, target)):
        extension = path.suffix.lower()
        if extension not in RAW_EXTENSIONS:
            others[extension] = others.get(extension, 0) + 1
            continue
        name = _name(path, source, settings.dataset)
        if name is None:
            refused.append((str(path), "is not named like a video of EPIC-KITCHENS (P01_01)"))
        elif name in by_name:
            refused.append((str(path), f"would become the same video as {by_name[name].path}"))
        else:
            by_name[name] = _raw(path, name)
    if not by_name:
        found = ", ".join(f"{n} {e or 'without extension'}" for e, n in sorted(others.items())) or "no files"
        why = refused[0][1] if refused else f"found: {found}"
        raise UserError(f"SOURCE {source}: holds no videos ({', '.join(RAW_EXTENSIONS)}); {why}")
    return Plan([by_name[name] for name in sorted(by_name)], refused)


def _files(source: Path, target: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return

    def failed(error: OSError):
        raise UserError(f"SOURCE {error.filename}: cannot be listed ({error.strerror})")

    seen = {os.path.realpath(source), os.path.realpath(target)}  # links may lead back to a folder above
    for folder, folders, names in os.walk(source, onerror=failed, followlinks=True):
        places = {f: os.path.realpath(os.path.join(folder, f)) for f in folders if not f.startswith(".")}
        folders[:] = sorted(f for f, place in places.items() if place not in seen)
        seen.update(places[f] for f in folders)
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _name(path: Path, source: Path, dataset: str) -> str | None:
    if dataset == "ek100":  # EPIC-KITCHENS/P01/videos/P01_01.MP4, or all in one folder
        match = _EK100_VIDEO.fullmatch(path.stem)
        return f"{match[1]}/{path.stem}" if match else None
    if dataset in ("ego4d", "egoschema") or source.is_file():
        return path.stem
    return str(path.relative_to(source).with_suffix("")).replace(os.sep, "/")


def _raw(path: Path, name: str) -> Raw:
    try:
        found = os.stat(path)
    except OSError:  # reported when it is opened
        return Raw(str(path), name, 0, 0)
    return Raw(str(path), name, found.st_size, found.st_mtime_ns)


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). UserError for what is no part of a whole; parts are counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text}: expected I/N, I from 0 to N - 1, such as 0/16 to 15/16")
    return int(match[1]), int(match[2])
