"""A small EgoSchema: long videos, and questions whose options only the order of events tells apart.

A scene is two actions, each filmed once and slowly. Either may run forwards or backwards and either may come
first, which makes eight arrangements of one set of frames. Five of them become videos of the scene, and all five
are asked about the same five options, one for each: whoever looks at the frames but not at their order
gives the five videos one answer, and is right about one of them.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avion.data.demo.backdrop import draw_room
from avion.data.demo.film import LEAD_SECONDS, encode, film_take
from avion.data.demo.vocabulary import PAIRS, Label, option_sentence

FPS = 4
ACTION_SECONDS = 32  # each of the two: a video lasts 64 s
QUESTION = "What does C do in the video, and in which order?"
OPTIONS = 5


def _label(verb: str, noun: str) -> Label:
    (pair,) = (p for p in PAIRS if p.forward == verb)
    assert noun in pair.nouns
    return Label(pair, noun, backward=False)


# Motions that are told from their reversals most easily, also by a small model that sees few frames of each.
SCENES: tuple[tuple[Label, Label], ...] = tuple(
    (_label(*one), _label(*two))
    for one, two in (
        (("fill", "bowl"), ("turn on", "tap")),
        (("lift", "mug"), ("push", "pan")),
        (("turn on", "tap"), ("push", "plate")),
        (("fold", "towel"), ("fill", "bowl")),
        (("lift", "box"), ("turn on", "tap")),
        (("push", "pan"), ("fold", "towel")),
        (("open", "drawer"), ("lift", "mug")),
        (("fill", "bowl"), ("lift", "box")),
    )
)


class Arrangement(NamedTuple):
    """Which of a scene's two actions comes first, and which of the two run backwards."""

    second_first: bool
    backward: tuple[bool, bool]

    def of(self, scene: tuple[Label, Label]) -> tuple[Label, Label]:
        """What happens first and what happens next."""
        labels = [label._replace(backward=b) for label, b in zip(scene, self.backward, strict=True)]
        return tuple(labels[::-1] if self.second_first else labels)


def arrangements(scene: int) -> tuple[Arrangement, ...]:
    """The five arrangements that become videos of scene number `scene`.

    Of the four combinations of directions one is shown in both orders, each of the others in one. Over eight scenes
    every arrangement serves equally often.
    """
    shown = []
    for directions in range(4):
        backward = (directions % 2 == 1, directions >= 2)
        first = bool((scene + scene // 4 + directions) % 2)
        shown += [Arrangement(f, backward) for f in ((False, True) if directions == scene % 4 else (first,))]
    return tuple(shown)


@dataclass(frozen=True)
class SceneTask:
    """The videos of one scene, which follow from the seed and the scene's number."""

    index: int
    seed: int
    folder: Path

    def uids(self) -> tuple[str, ...]:
        """The question's name for each of the five videos."""
        rng = np.random.default_rng((self.seed, 2, 0, self.index))
        return tuple(str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(OPTIONS))

    def film(self) -> tuple:
        """Writes `{folder}/{uid}.mp4` for each arrangement; there are no clips to annotate."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for uid, frames in zip(self.uids(), film_scene(self.index, self.seed), strict=True):
            # Nobody reads a part of these: keyframes may be far apart.
            encode(self.folder / f"{uid}.mp4", frames, FPS, crf=30, keyframe_interval=60)
        return ()


def film_scene(index: int, seed: int) -> list[np.ndarray]:
    """The five videos of a scene, (F, H, W, 3) uint8 each: the same frames, arranged differently."""
    rng = np.random.default_rng((seed, 2, 1, index))
    scene = SCENES[index % len(SCENES)]
    room = draw_room(rng)
    duration = ACTION_SECONDS - 2 * LEAD_SECONDS
    actions = [film_take(label, room, rng, FPS, duration=duration).frames for label in scene]
    videos = []
    for second_first, backward in arrangements(index):
        parts = [frames[::-1] if b else frames for frames, b in zip(actions, backward, strict=True)]
        videos.append(np.concatenate(parts[::-1] if second_first else parts))
    return videos


def write_questions(tasks: Sequence[SceneTask], questions: Path, answers: Path, origins: Path) -> None:
    """`questions.json`, `subset_answers.json` and `uid_to_ego4d.json`.

    Every place among the options is the right one equally often. The videos were filmed for EgoSchema alone: their
    video_uids are those of no other video.
    """
    rows, right, origin = [], {}, {}
    for task in tasks:
        rng = np.random.default_rng((task.seed, 2, 2, task.index))
        scene = SCENES[task.index % len(SCENES)]
        texts = [option_sentence(*a.of(scene)) for a in arrangements(task.index)]
        places = rng.permutation(OPTIONS).tolist()
        for i, (uid, place) in enumerate(zip(task.uids(), places, strict=True)):
            others = [texts[j] for j in rng.permutation(OPTIONS) if j != i]
            options = [*others[:place], texts[i], *others[place:]]
            named = {f"option {k}": text for k, text in enumerate(options)}
            rows.append({"q_uid": uid, "google_drive_id": rng.bytes(12).hex(), "question": QUESTION, **named})
            right[uid] = place
            video_uid = str(uuid.UUID(bytes=rng.bytes(16), version=4))
            origin[uid] = {"video_uid": video_uid, "starting_sec": 0, "ending_sec": 2 * ACTION_SECONDS}
    questions.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((questions, rows), (answers, right), (origins, origin)):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
