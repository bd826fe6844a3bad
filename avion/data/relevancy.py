"""How well sentences describe clips of EPIC-KITCHENS-100, by the classes of their verbs and nouns.

The relevancy of clip c and sentence s is ½ · [c and s have the same verb class] + ½ · |N_c ∩ N_s| / |N_c ∪ N_s|, where
N are the sets of noun classes (Damen et al., arXiv 2006.13256). A sentence has the classes of the clip of its narration
id. The share of two empty sets is 0.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avion.data.ek100 import EK100Table
from avion.errors import UserError
from avion.files import written_whole

BLOCK_ELEMENTS = 1 << 21  # of the matrix at a time: 16 MB of float64, and a few times as much while they are computed


@dataclass(frozen=True)
class Classes:
    """The classes of clips or sentences.

    Attributes:
        verbs: A verb class each, (n,) int64.
        nouns: The noun classes of each, a set written as a tuple.
    """

    verbs: np.ndarray
    nouns: Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.verbs)

    def rows(self, rows: Sequence[int]) -> Classes:
        return Classes(self.verbs[list(rows)], [self.nouns[i] for i in rows])


def clip_classes(clips: EK100Table, path: str | os.PathLike) -> Classes:
    """Return the classes of the clips that `read_ek100_retrieval(path)` returned.

    Raises:
        UserError: The CSV of the clips has no columns with classes.
    """
    columns = {"verb_class": clips.verb_class, "all_noun_classes": clips.all_noun_classes}
    for name, column in columns.items():
        if column is None:
            raise UserError(f"annotations {path}: the column {name!r} is missing, relevancies are computed from it")
    return Classes(clips.verb_class, clips.all_noun_classes)


def sentence_classes(
    clips: EK100Table, classes: Classes, ids: Sequence[str], clips_path: str | os.PathLike, path: str | os.PathLike
) -> Classes:
    """Return the classes of the sentences with these narration ids, which are those of the clips of the same ids.

    Raises:
        UserError: A clip is missing, or two clips have the same id.
    """
    row_of = {name: i for i, name in enumerate(clips.narration_ids)}
    if len(row_of) < len(clips):
        seen: set[str] = set()
        twice = next(name for name in clips.narration_ids if name in seen or seen.add(name))
        raise UserError(f"annotations {clips_path}: narration_id {twice!r} is there twice; ids must be unique")
    lost = [name for name in ids if name not in row_of]
    if lost:
        raise UserError(
            f"sentences {path}: {len(lost)} of {len(ids)} narration ids are not in {clips_path} "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}), so their classes are unknown; give the CSV "
            "of the same split, with all its clips"
        )
    return classes.rows([row_of[name] for name in ids])


def relevancy_blocks(clips: Classes, sentences: Classes) -> Iterator[np.ndarray]:
    """Yield the relevancy matrix (clips, sentences), float64 in [0, 1], in blocks of rows."""
    known, flat = np.unique([n for nouns in (*clips.nouns, *sentences.nouns) for n in nouns], return_inverse=True)
    members = _members([*clips.nouns, *sentences.nouns], flat, len(known))  # (clips + sentences, nouns)
    own, others = members[: len(clips)], members[len(clips) :]
    sizes, other_sizes = own.sum(1), others.sum(1)
    rows = max(1, BLOCK_ELEMENTS // max(len(sentences), 1))
    for first in range(0, len(clips), rows):
        block = slice(first, first + rows)
        common = own[block] @ others.T  # (r, sentences); float32 is exact for counts
        either = sizes[block, None] + other_sizes - common
        nouns = np.divide(common, either, out=np.zeros(common.shape), where=either > 0, dtype=np.float64)
        yield 0.5 * (clips.verbs[block, None] == sentences.verbs) + 0.5 * nouns


def _members(nouns: Sequence[tuple[int, ...]], flat: np.ndarray, count: int) -> np.ndarray:
    """Return a matrix (len(nouns), count) float32 that is 1 where a set contains a noun.

    Args:
        nouns: The sets.
        flat: The numbers of the nouns of all sets, one set after the other.
        count: The number of nouns.
    """
    members = np.zeros((len(nouns), count), dtype=np.float32)
    members[np.repeat(np.arange(len(nouns)), [len(n) for n in nouns]), flat.reshape(-1)] = 1.0
    return members


# --- writing ---------------------------------------------------------------------------------


def write_relevancy(path: str | os.PathLike, blocks: Iterator[np.ndarray], shape: tuple[int, int]) -> None:
    """Write rows into a pickled numpy array as they come; the file is written whole or not at all.

    The array is float64, as the dataset's own script makes it. `pickle` would need the whole matrix in memory and its
    bytes beside it: 17 GB for the train split. This function writes the same pickle, of protocol 4, and names numpy's
    modules as numpy 1 does, which numpy 2 reads as well.

    Raises:
        UserError: The file cannot be written.
    """
    before, after = _pickle_around(shape)
    rows = 0
    with written_whole(path, cure="give another file") as file:
        file.write(before)
        for block in blocks:
            assert block.shape[1] == shape[1], f"a block of {block.shape[1]} columns for {shape[1]}"
            rows += len(block)
            file.write(np.ascontiguousarray(block, dtype="<f8").data)
        assert rows == shape[0], f"{rows} rows for {shape[0]}"
        file.write(after)


def _pickle_around(shape: tuple[int, int]) -> tuple[bytes, bytes]:
    """Return the bytes before and after the numbers of a float64 matrix in its pickle."""

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return pickle.BININT + struct.pack("<i", value)

    empty = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + number(0) + pickle.TUPLE1
    empty += pickle.SHORT_BINBYTES + b"\x01b" + pickle.TUPLE3 + pickle.REDUCE
    dtype = named("numpy", "dtype") + text("f8") + pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3 + pickle.REDUCE
    dtype += pickle.MARK + number(3) + text("<") + 3 * pickle.NONE + number(-1) + number(-1) + number(0)
    dtype += pickle.TUPLE + pickle.BUILD
    state = pickle.MARK + number(1) + number(shape[0]) + number(shape[1]) + pickle.TUPLE2 + dtype + pickle.NEWFALSE
    size = pickle.BINBYTES8 + struct.pack("<Q", 8 * shape[0] * shape[1])
    return pickle.PROTO + b"\x04" + empty + state + size, pickle.TUPLE + pickle.BUILD + pickle.STOP


# --- comparing -------------------------------------------------------------------------------


def differences(
    found: np.ndarray, blocks: Iterator[np.ndarray], tolerance: float, limit: int
) -> tuple[int, list[tuple[int, int, float]]]:
    """Compare `found` (clips, sentences) with the computed relevancies.

    Returns:
        The number of cells that differ by more than `tolerance`, and the first `limit` of them as
        (clip, sentence, computed relevancy).
    """
    count, first, row = 0, [], 0
    for block in blocks:
        rows, columns = np.nonzero(np.abs(found[row : row + len(block)] - block) > tolerance)
        count += len(rows)
        cells = zip(rows[: limit - len(first)].tolist(), columns.tolist(), strict=False)
        first += [(row + r, c, float(block[r, c])) for r, c in cells]
        row += len(block)
    return count, first
