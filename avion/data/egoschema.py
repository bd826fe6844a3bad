"""EgoSchema: questions, public answers, where its videos come from, and which of their frames are read.

questions.json        [{"q_uid", "question", "option 0" ... "option 4", ...}, ...]
subset_answers.json   {q_uid: 0 ... 4}
uid_to_ego4d.json     {q_uid: {"video_uid", "starting_sec", "ending_sec"}}
{root}/{q_uid}.mp4    the videos, of three minutes each
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.constants import VIDEO_SAMPLINGS
from avion.data.transforms import EvalTransform
from avion.data.video import VideoError, open_video, resolve_decoder, uniform_frame_ids
from avion.errors import UserError
from avion.reading import parse_json, read_text
from avion.remote import is_remote, joined

OPTIONS = 5
_UID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True)
class Question:
    """A question about the video `{uid}.mp4`, with its five possible answers."""

    uid: str
    text: str
    options: tuple[str, ...]


# ---- annotations -------------------------------------------------------------------------------


def read_questions(path: str | os.PathLike) -> list[Question]:
    """Read the questions in the order of the file.

    Raises:
        UserError: The file is not a list of questions. The message has one line with file, question and field.
    """
    rows = read_json(path, "questions")
    if not isinstance(rows, list) or not rows:
        found = "an empty one" if rows == [] else f"a {type(rows).__name__}"
        raise UserError(f"questions {path}: a list of questions is required, found {found}")
    questions: dict[str, Question] = {}
    for i, row in enumerate(rows):
        try:
            question = _question(row)
        except ValueError as error:
            raise UserError(f"questions {path}: question {i}: {error}") from None
        if question.uid in questions:
            raise UserError(f"questions {path}: question {i}: q_uid {question.uid} occurs twice; remove one of the two")
        questions[question.uid] = question
    return list(questions.values())


def _question(row: object) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}, an object with q_uid, question and option 0 to 4 is required")
    uid = _checked_uid(row.get("q_uid"))
    return Question(uid, _text(row, "question"), tuple(_text(row, f"option {k}") for k in range(OPTIONS)))


def _text(row: Mapping[str, object], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        found = "it is missing" if field not in row else f"found {str(value)[:40]!r}"
        raise ValueError(f"field {field!r}: a text is required, {found}")
    return value.strip()


def _checked_uid(uid: object) -> str:
    """Return the uid if it is a plain name: it becomes the name of a file, and must not lead out of the video root."""
    if not isinstance(uid, str) or not _UID.fullmatch(uid):
        raise ValueError(
            f"field 'q_uid': a name of letters, digits, '-', '_' and '.' is required, found {str(uid)[:60]!r}"
        )
    return uid


def read_answers(path: str | os.PathLike, questions: Sequence[Question]) -> dict[str, int]:
    """Read the right options, 0 to 4, of some of the questions.

    Raises:
        UserError: The file holds other values or answers to unknown questions.
    """
    answers = read_json(path, "answers")
    if not isinstance(answers, dict) or not answers:
        raise UserError(
            f"answers {path}: an object of the form {{q_uid: 0 to 4}} is required, with at least one answer"
        )
    known = {question.uid for question in questions}
    for uid, answer in answers.items():
        if type(answer) is not int or not 0 <= answer < OPTIONS:
            raise UserError(f"answers {path}: {uid[:60]}: a number from 0 to 4 is required, found {str(answer)[:40]!r}")
    unknown = [uid for uid in answers if uid not in known]
    if unknown:
        raise UserError(
            f"answers {path}: {len(unknown)} of {len(answers)} q_uids are not among the questions, first "
            f"{unknown[0][:60]!r}; give the answers that belong to the questions"
        )
    return answers


def read_sources(path: str | os.PathLike) -> dict[str, str]:
    """Read from which Ego4D video (its video_uid) the video of each question was cut."""
    rows = read_json(path, "sources")
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"sources {path}: an object of the form {{q_uid: {{video_uid: ...}}}} is required")
    sources = {}
    for uid, row in rows.items():
        video = row.get("video_uid") if isinstance(row, dict) else None
        if not isinstance(video, str) or not video:
            raise UserError(
                f"sources {path}: {uid[:60]}: field 'video_uid': a text is required, found {str(video)[:40]!r}"
            )
        sources[uid] = video
    return sources


def read_json(path: str | os.PathLike, what: str) -> object:
    """Return any JSON value; a key that occurs twice in one object is an error."""
    try:
        return parse_json(read_text(path), pairs=_without_repeats, nan=True)
    except FileNotFoundError:
        raise UserError(f"{what} {path}: no such file") from None
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror})") from None
    except _RepeatedKey as error:
        raise UserError(f"{what} {path}: {str(error)[:80]!r} occurs twice; remove one of the two") from None
    except ValueError as error:
        why = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)[:100]
        raise UserError(f"{what} {path}: not valid JSON ({why}); fetch the file again") from None


class _RepeatedKey(Exception):
    pass


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKey(key)
        found[key] = value
    return found


# ---- frames ------------------------------------------------------------------------------------


def frame_ids(video_frames: int, num_frames: int, sampling: str) -> np.ndarray:
    """Choose the frames of a video that make a clip of `num_frames`.

    Args:
        video_frames: The number of frames of the video.
        num_frames: The number of frames of the clip.
        sampling: "uniform" takes the middle frames of equal segments of the whole video. "prefix" takes the first
            frames; a video with fewer frames is sampled as with "uniform" (Video Mamba Suite's rule). "prefix-hold"
            takes the first frames and repeats the last frame of a video with fewer frames.

    Returns:
        (num_frames,) int64, ascending.

    Raises:
        UserError: A number is below 1, or `sampling` has another value.
    """
    if video_frames < 1 or num_frames < 1:
        raise UserError(f"{num_frames} frames of a video of {video_frames}: both must be at least 1")
    if sampling == "uniform" or (sampling == "prefix" and num_frames > video_frames):
        return uniform_frame_ids(0, video_frames, num_frames)
    if sampling in ("prefix", "prefix-hold"):
        return np.minimum(np.arange(num_frames, dtype=np.int64), video_frames - 1)
    raise UserError(f"sampling: {sampling!r} is not one of {', '.join(VIDEO_SAMPLINGS)}")


class LongVideos(Dataset):
    """The frames that several clip lengths need of each video, read in one pass.

    `videos[(i, counts)]` is a dict, of question i's video and for clips of `counts` frames:

        index    int, i
        frames   Tensor (k, 3, size, size) uint8: each needed frame once, the shorter side resized, the centre cut out
        clips    {count: LongTensor (count,)}, a clip's frames as positions in `frames`
        error    str, why the video cannot be read (`frames` is then empty); "" if it could

    Only the content of `frames` is held in memory; pictures of full size are decoded one by one.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        root: str | os.PathLike,
        *,
        size: int,
        sampling: str,
        decoder: str = "auto",
        threads: int = 1,
    ):
        self.questions, self.root, self.sampling = questions, os.fspath(root), sampling
        if not is_remote(root) and not os.path.isdir(root):
            raise UserError(f"--root {root}: no such folder; give the folder that the videos {{q_uid}}.mp4 are in")
        if sampling not in VIDEO_SAMPLINGS:
            raise UserError(f"sampling: {sampling!r} is not one of {', '.join(VIDEO_SAMPLINGS)}")
        self.decoder, self.threads = resolve_decoder(decoder), threads
        self.transform = EvalTransform(size, fused=True)

    def __len__(self) -> int:
        return len(self.questions)

    def path(self, index: int) -> str | Path:
        path = joined(self.root, f"{self.questions[index].uid}.mp4")
        return path if is_remote(path) else Path(path)

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> dict[str, object]:
        index, counts = key
        try:
            return {"index": index, **self._read(self.path(index), counts), "error": ""}
        except VideoError as error:
            size = self.transform.crop_size
            empty = torch.empty(0, 3, size, size, dtype=torch.uint8)
            return {"index": index, "frames": empty, "clips": {}, "error": str(error)}

    def _read(self, path: str | Path, counts: Sequence[int]) -> dict[str, object]:
        with open_video(path, self.decoder, self.threads) as reader:
            clips = {count: frame_ids(reader.num_frames, count, self.sampling) for count in counts}
            needed = np.unique(np.concatenate(list(clips.values())))
            size = self.transform.crop_size
            frames = torch.empty(len(needed), 3, size, size, dtype=torch.uint8)
            for number, picture in reader.stream_frames(needed):
                # A copy, because a rotated picture is a view that torch does not accept.
                clip = self.transform(np.ascontiguousarray(picture)[None], None)  # (3, 1, size, size)
                frames[np.searchsorted(needed, number)] = clip[:, 0]
        positions = {count: torch.from_numpy(np.searchsorted(needed, ids)) for count, ids in clips.items()}
        return {"frames": frames, "clips": positions}
