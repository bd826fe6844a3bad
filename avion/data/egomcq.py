"""EgoMCQ: which of five clips of Ego4D does a sentence describe?

egomcq.json    {"0": {"answer": 0 … 4, "query": {"clip_text", …}, "types": 1 or 2,
                      "choices": {"0" … "4": {"video_uid", "clip_start", "clip_end", "clip_text"}}}, …}

Type 1 takes the five clips from one video (intra-video), type 2 from five videos (inter-video).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from avion.constants import EGOMCQ_INTER, EGOMCQ_INTRA
from avion.data.egoschema import read_json
from avion.data.narrations import NarrationTable, TableBuilder
from avion.errors import UserError

CHOICES = 5


@dataclass(frozen=True)
class EgoMcq:
    """The questions, n of them.

    Attributes:
        ids: The keys of the questions.
        queries: The sentence of each question.
        clips: The distinct clips of all questions.
        choices: (n, 5) int64, rows of `clips`.
        answers: (n,) int64, 0 to 4.
        types: (n,) int64, EGOMCQ_INTRA or EGOMCQ_INTER.
    """

    ids: tuple[str, ...]
    queries: tuple[str, ...]
    clips: NarrationTable
    choices: np.ndarray
    answers: np.ndarray
    types: np.ndarray


def read_egomcq(path: str | os.PathLike) -> EgoMcq:
    """Read the questions in the order of the file.

    Raises:
        UserError: The file has another form. The message has one line with file, question and field.
    """
    content = read_json(path, "questions")
    if not isinstance(content, dict) or not content:
        raise UserError(f"questions {path}: an object of questions is required, found {_shown(content)}")
    builder, place = TableBuilder(), {}
    queries, choices, answers, types = [], [], [], []
    for name, row in content.items():
        try:
            queries.append(_text(_object(_object(row, "").get("query"), "query").get("clip_text"), "query: clip_text"))
            answers.append(_one_of(row.get("answer"), "answer", range(CHOICES)))
            types.append(_one_of(row.get("types"), "types", (EGOMCQ_INTRA, EGOMCQ_INTER)))
            options = _object(row.get("choices"), "choices")
            if sorted(options) != [str(k) for k in range(CHOICES)]:
                raise ValueError(f"choices: the keys 0 to {CHOICES - 1} are required, found {', '.join(options)[:60]}")
            choices.append([_clip(options[str(k)], f"choices: {k}", builder, place) for k in range(CHOICES)])
        except ValueError as error:
            raise UserError(f"questions {path}: question {name[:40]}: {error}") from None
    return EgoMcq(
        tuple(content),
        tuple(queries),
        builder.build(),
        np.array(choices, dtype=np.int64),
        np.array(answers, dtype=np.int64),
        np.array(types, dtype=np.int64),
    )


def _clip(row: object, where: str, builder: TableBuilder, place: dict[tuple[str, float, float], int]) -> int:
    """The number of a clip; a clip that occurs again keeps its number."""
    clip = _object(row, where)
    video = _text(clip.get("video_uid"), f"{where}: video_uid")
    start, end = (_seconds(clip.get(field), f"{where}: {field}") for field in ("clip_start", "clip_end"))
    key = (video, start, end)
    if key not in place:
        try:
            builder.add(video, start, end, video)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        place[key] = len(place)
    return place[key]


def _object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{f'{where}: ' if where else ''}an object is required, found {_shown(value)}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: a text is required, found {_shown(value)}")
    return value.strip()


def _one_of(value: object, where: str, allowed: range | tuple[int, ...]) -> int:
    if type(value) is not int or value not in allowed:
        raise ValueError(f"{where}: one of {', '.join(map(str, allowed))} is required, found {_shown(value)}")
    return value


def _seconds(value: object, where: str) -> float:
    """A number, or a text that says one: copies of the file differ in that."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{where}: a number of seconds is required, found {_shown(value)}") from None


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]
