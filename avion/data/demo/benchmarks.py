"""Writes the demo's files for the zero-shot benchmarks, in the formats of EGTEA, Charades-Ego, EgoMCQ and captions.

Only EGTEA needs videos of its own, trimmed clips that are cut out of evaluation videos. Charades-Ego has the videos of
EgoSchema, in which two actions follow each other; EgoMCQ and the captions have the evaluation videos.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from avion.data.demo.annotations import EK100Clip
from avion.data.demo.egoschema import ACTION_SECONDS, SCENES, SceneTask, arrangements
from avion.data.demo.film import encode
from avion.data.demo.paths import DemoPaths
from avion.data.demo.vocabulary import LABELS, NOUNS, VERBS, Label, all_nouns, evaluation_sentence, training_sentence
from avion.data.video import open_video

_PER_CLASS = 3  # trimmed clips
_CHOICES = 5
_QUESTIONS = 48  # of each type, at most
_INTRA, _INTER = 1, 2
_CHARADES = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length,egocentric,charades_video"
).split(",")


def write_benchmarks(paths: DemoPaths, clips: Sequence[EK100Clip], scenes: Sequence[SceneTask], seed: int) -> None:
    """Write all files.

    Args:
        paths: The paths of the files.
        clips: The evaluation clips, whose videos exist already.
        scenes: The scenes of EgoSchema, whose videos exist already.
        seed: The seed of the dataset.
    """
    _write_egtea(paths, _first_of_each(clips, _PER_CLASS))
    _write_charades(paths, scenes)
    questions = _questions(clips, np.random.default_rng((seed, 3, 0)))
    content = {str(i): question for i, question in enumerate(questions)}
    paths.egomcq.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _write_captions(paths.captions, _first_of_each(clips, 1), np.random.default_rng((seed, 3, 1)))


def _first_of_each(clips: Sequence[EK100Clip], count: int) -> list[EK100Clip]:
    """The first clips of every label, in the order of the labels."""
    return [c for label in LABELS for c in [c for c in clips if c.clip.label == label][:count]]


# ---- EGTEA -------------------------------------------------------------------------------------


def _write_egtea(paths: DemoPaths, clips: Sequence[EK100Clip]) -> None:
    paths.egtea_classes.parent.mkdir(parents=True, exist_ok=True)
    names = (evaluation_sentence(label).capitalize().replace(" ", "_") for label in LABELS)
    _write_lines(paths.egtea_classes, (f"{name} {number}" for number, name in enumerate(names, 1)))
    lines = []
    by_video = sorted(clips, key=lambda c: (c.participant, c.video))
    for (participant, video), own in groupby(by_video, key=lambda c: (c.participant, c.video)):
        frames = _frames_of(paths.ek100_videos / participant / f"{video}.MP4")
        recording = f"{participant}-R{video.split('_')[1]}-Table"
        (paths.egtea_clips / recording).mkdir(parents=True)
        for clip in own:
            first, last = round(clip.clip.start * clip.fps), round(clip.clip.stop * clip.fps)
            times = f"{1000 * clip.clip.start:.0f}-{1000 * clip.clip.stop:.0f}"
            name = f"{recording}-{times}-F{first:06d}-F{last:06d}"
            encode(paths.egtea_clips / recording / f"{name}.mp4", frames[first:last], clip.fps)
            label = clip.clip.label
            numbers = [LABELS.index(label), VERBS.index(label.verb), *(NOUNS.index(noun) for noun in all_nouns(label))]
            lines.append(" ".join([name, *(str(number + 1) for number in numbers)]))
    _write_lines(paths.egtea_split, lines)


def _frames_of(folder: Path) -> np.ndarray:
    """All frames of a video in chunks, (F, H, W, 3) uint8."""
    parts = []
    for path in sorted(folder.iterdir(), key=lambda p: int(p.stem)):
        with open_video(path, "pyav") as reader:
            parts.append(reader.get_frames(range(reader.num_frames)))
    return np.concatenate(parts)


# ---- Charades-Ego ------------------------------------------------------------------------------


def _write_charades(paths: DemoPaths, scenes: Sequence[SceneTask]) -> None:
    paths.charades_classes.parent.mkdir(parents=True, exist_ok=True)
    code = {label: f"c{number:03d}" for number, label in enumerate(LABELS)}
    _write_lines(
        paths.charades_classes, (f"{code[label]} {evaluation_sentence(label).capitalize()}" for label in LABELS)
    )
    rows = []
    for task in scenes:
        scene = SCENES[task.index % len(SCENES)]
        for uid, arrangement in zip(task.uids(), arrangements(task.index), strict=True):
            shown = arrangement.of(scene)
            actions = ";".join(
                f"{code[label]} {ACTION_SECONDS * i:.2f} {ACTION_SECONDS * (i + 1):.2f}"
                for i, label in enumerate(shown)
            )
            script = ", then ".join(evaluation_sentence(label) for label in shown)
            length = f"{2 * ACTION_SECONDS:.2f}"
            rows.append([uid, "C", "Kitchen", 7, 7, "Yes", script, "", "", actions, length, "Yes", uid])
    _write_csv(paths.charades_split, _CHARADES, rows)


# ---- EgoMCQ and captions -----------------------------------------------------------------------


def _questions(clips: Sequence[EK100Clip], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Questions of both types. The reversed action is among the five clips where the video or the dataset has it."""
    questions = []
    for kind in (_INTRA, _INTER):
        asked = [clips[i] for i in rng.permutation(len(clips))]
        found = []
        for clip in asked:
            others = [c for c in clips if (c.video == clip.video) == (kind == _INTRA)]
            choices = _choices(clip, others, rng, one_per_video=kind == _INTER)
            if len(choices) == _CHOICES and len(found) < _QUESTIONS:
                order = rng.permutation(_CHOICES).tolist()
                found.append(_question([choices[i] for i in order], order.index(0), kind, rng))
        questions += found
    return questions


def _choices(
    clip: EK100Clip, others: Sequence[EK100Clip], rng: np.random.Generator, *, one_per_video: bool
) -> list[EK100Clip]:
    """The clip and up to four others that show different things, one of them the reversed action if there is one."""
    chosen = [clip]
    drawn = [others[i] for i in rng.permutation(len(others))]
    for other in sorted(drawn, key=lambda c: c.clip.label != clip.clip.label.partner):
        new = other.clip.label not in {c.clip.label for c in chosen}
        elsewhere = not one_per_video or other.video not in {c.video for c in chosen}
        if new and elsewhere and len(chosen) < _CHOICES:
            chosen.append(other)
    return chosen


def _question(choices: Sequence[EK100Clip], answer: int, kind: int, rng: np.random.Generator) -> dict[str, Any]:
    entries = [_entry(choice, rng) for choice in choices]
    options = {str(i): entry for i, entry in enumerate(entries)}
    return {"answer": answer, "query": entries[answer], "choices": options, "types": kind}


def _entry(clip: EK100Clip, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "video_uid": f"{clip.participant}/{clip.video}",
        "clip_start": round(clip.clip.start, 3),
        "clip_end": round(clip.clip.stop, 3),
        "clip_text": training_sentence(clip.clip.label, rng),
    }


def _write_captions(path: Path, clips: Sequence[EK100Clip], rng: np.random.Generator) -> None:
    """Two captions of each clip."""

    def captions(label: Label) -> tuple[str, str]:
        return training_sentence(label, rng), f"#C C {evaluation_sentence(label)}"

    rows = [
        (f"{c.participant}/{c.video}", round(c.clip.start, 3), round(c.clip.stop, 3), text)
        for c in clips
        for text in dict.fromkeys(captions(c.clip.label))
    ]
    _write_csv(path, ("video", "start", "end", "caption"), rows)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
