"""How the videos below a root are laid out: which file holds which seconds of which video.

Three layouts, recognised once per root:

    avion   {root}/{video}.mp4/{start}.mp4            start = 0, L, 2 L, ... seconds (AVION, LaViLa)
    vms     {root}/{video}/{start // L:04d}.mp4       (Video Mamba Suite)
    whole   {root}/{video}.mp4

`video` is the path below the root without extension: "9a7c2b-..." for Ego4D, "P01/P01_01" for EPIC-KITCHENS.
A video of EPIC-KITCHENS may also lie without the folder of its participant, in each of the layouts: Video Mamba
Suite has {root}/P01_01/0000.mp4. Extensions (.mp4, .MP4, ...) are those found on disk, and may differ between files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from avion.errors import UserError

from .storage import Storage, storage_of

LAYOUTS = ("avion", "vms", "whole")
VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_LISTED = 64  # entries of a folder that are looked at to recognise a layout


@dataclass(frozen=True)
class Layout:
    kind: str  # one of LAYOUTS, or "files"
    folder_extension: str  # of a video's folder of chunks ("avion" only)
    extension: str  # of the video files
    flat: bool = False  # the videos lie directly below the root, not in folders of several videos

    def pattern(self) -> str:
        return {
            "avion": f"{{video}}{self.folder_extension}/{{start}}{self.extension}",
            "vms": f"{{video}}/{{chunk:04d}}{self.extension}",
            "whole": f"{{video}}{self.extension}",
            "files": "{video}",
        }[self.kind]


def find_layout(root: str | os.PathLike, kind: str = "auto") -> Layout:
    """Recognise how the videos under `root` are laid out. UserError if there are none in a known layout."""
    if kind == "files":  # each video is named by its path
        return Layout("files", "", "")
    if kind not in ("auto", *LAYOUTS):
        raise UserError(f"video layout: {kind!r} is not one of auto, {', '.join(LAYOUTS)}")
    storage = storage_of(root)
    try:
        if not storage.is_dir(storage.root):
            raise UserError(f"video root {root}: no such folder")
        layout = _find_layout(storage, storage.root, kind, depth=0)
    except OSError as error:
        raise UserError(f"video root {root}: cannot be listed ({error.strerror or error})") from None
    if layout is None:
        wanted = "in a known layout" if kind == "auto" else f"in the layout {kind!r}"
        raise UserError(
            f"video root {root}: no videos {wanted} were found; expected {{video}}.mp4/{{start}}.mp4, "
            "{video}/{chunk:04d}.mp4 or {video}.mp4 below it"
        )
    return layout


def _find_layout(storage: Storage, folder: str, kind: str, depth: int) -> Layout | None:
    plain_folders = []
    for name, is_folder in storage.entries(folder)[:_LISTED]:
        path = storage.join(folder, name)
        stem, extension = os.path.splitext(name)
        is_video_name = extension.lower() in VIDEO_EXTENSIONS
        if is_folder:
            if is_video_name and kind in ("auto", "avion"):
                chunk_extension = _extension_of_chunks(storage, path)
                if chunk_extension is not None:
                    return Layout("avion", extension, chunk_extension, flat=depth == 0)
            plain_folders.append(path)
        elif is_video_name:
            found = "vms" if depth > 0 and re.fullmatch(r"\d{4}", stem) else "whole"
            if kind in ("auto", found):
                return Layout(found, "", extension, flat=depth == (1 if found == "vms" else 0))
    if depth < 2:
        for plain in plain_folders[:16]:
            try:
                layout = _find_layout(storage, plain, kind, depth + 1)
            except PermissionError:  # one folder among many: its clips will be told as unreadable
                continue
            if layout is not None:
                return layout
    return None


def _extension_of_chunks(storage: Storage, folder: str) -> str | None:
    try:
        names = [name for name, _ in storage.entries(folder)]
    except PermissionError:
        return None
    for stem, extension in map(os.path.splitext, names):
        if stem.isdigit() and extension.lower() in VIDEO_EXTENSIONS:
            return extension
    return None


def list_videos(root: str | os.PathLike, layout: Layout) -> list[str]:
    """The names of all videos below a root, sorted, each once. UserError where a folder cannot be listed.

    Hidden folders are left out, and of links to folders those that lead back to a folder above them.
    """
    storage = storage_of(root)
    try:
        return sorted(set(_listed(storage, storage.root, "", layout, ())))
    except OSError as error:
        raise UserError(f"video root {root}: cannot be listed ({error.filename}: {error.strerror or error})") from None


def _listed(storage: Storage, folder: str, name: str, layout: Layout, above: tuple[str, ...]) -> Iterator[str]:
    """The videos in the folder `folder`, whose path below the root is `name`."""
    real = folder if storage.remote else os.path.realpath(folder)
    if real in above:
        return
    entries = storage.entries(folder)
    stem, extension = os.path.splitext(name)
    chunked = [n for n, is_folder in entries if not is_folder and _chunk_number(n, layout.kind) is not None]
    if layout.kind == "avion" and chunked and extension.lower() in VIDEO_EXTENSIONS:
        yield stem
    elif layout.kind == "vms" and chunked and name:
        yield name
    for entry, is_folder in entries:
        path = f"{name}/{entry}" if name else entry
        if is_folder:
            yield from _listed(storage, storage.join(folder, entry), path, layout, (*above, real))
        elif layout.kind in ("whole", "files") and os.path.splitext(entry)[1].lower() in VIDEO_EXTENSIONS:
            yield path if layout.kind == "files" else os.path.splitext(path)[0]


def _chunk_number(name: str, kind: str) -> int | None:
    stem, extension = os.path.splitext(name)
    if extension.lower() not in VIDEO_EXTENSIONS:
        return None
    form = r"\d{4,}" if kind == "vms" else r"\d+"
    return int(stem) if re.fullmatch(form, stem, re.ASCII) else None


def other_extensions(name: str) -> list[str]:
    """The names that a video of this name may have with another extension, or the same one in other letters."""
    stem, extension = os.path.splitext(name)
    if extension.lower() not in VIDEO_EXTENSIONS:
        return []
    return [stem + e for known in VIDEO_EXTENSIONS for e in (known, known.upper()) if e != extension]
