"""Writes the demo dataset's annotations in the formats of the real datasets.

Ego4D: LaViLa's pickled list of (video_uid, start_sec, end_sec, narration). EPIC-KITCHENS-100: the retrieval and action
CSVs, sentence CSVs, relevancy matrices, class and tail lists. Bytes depend on the clips only.
"""

import csv
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avion.data.demo.film import Clip
from avion.data.demo.vocabulary import LABELS, NOUNS, PAIRS, VERBS, Label, all_nouns, evaluation_sentence, verb_key

# As the header of EPIC_100_retrieval_test.csv.
COLUMNS = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame "
    "narration verb verb_class noun noun_class all_nouns all_noun_classes"
).split()


class EK100Clip(NamedTuple):
    narration_id: str
    participant: str
    video: str
    fps: int
    clip: Clip


def write_narrations(path: Path, rows: Sequence[tuple[str, float, float, str]]) -> None:
    """The Ego4D pickle: a list of (video_uid, start_sec, end_sec, narration)."""
    path.write_bytes(pickle.dumps(list(rows), protocol=4))


def write_clips(path: Path, clips: Sequence[EK100Clip]) -> None:
    """The clips of a split, for action recognition or for retrieval: the columns are the same."""
    _write_csv(path, COLUMNS, (_row(clip) for clip in clips))


def write_retrieval(clips: Sequence[EK100Clip], csv_path: Path, sentences_path: Path, relevancy_path: Path) -> None:
    """A retrieval split: its clips, its different sentences, their relevancy matrix (clips × sentences, float64)."""
    write_clips(csv_path, clips)
    sentences: dict[str, EK100Clip] = {}
    for clip in clips:
        sentences.setdefault(evaluation_sentence(clip.clip.label), clip)
    rows = ((clip.narration_id, text) for text, clip in sentences.items())
    _write_csv(sentences_path, ("narration_id", "narration"), rows)
    columns = {label: [relevancy(label, b.clip.label) for b in sentences.values()] for label in LABELS}
    matrix = np.array([columns[clip.clip.label] for clip in clips])
    relevancy_path.parent.mkdir(parents=True, exist_ok=True)
    relevancy_path.write_bytes(pickle.dumps(matrix, protocol=4))


def relevancy(clip: Label, sentence: Label) -> float:
    """½·[same verb] + ½·IoU of the nouns (EPIC-KITCHENS-100, multi-instance retrieval)."""
    a, b = set(all_nouns(clip)), set(all_nouns(sentence))
    return 0.5 * (clip.verb == sentence.verb) + 0.5 * len(a & b) / len(a | b)


def write_classes(verbs: Path, nouns: Path) -> None:
    """The class lists: id, key, the words that belong to it, a category."""
    header = ("id", "key", "instances", "category")
    category = {verb: f"{pair.forward}/{pair.backward}" for pair in PAIRS for verb in (pair.forward, pair.backward)}
    keys = ((i, verb_key(v), str([verb_key(v)]), category[v]) for i, v in enumerate(VERBS))
    _write_csv(verbs, header, keys)
    _write_csv(nouns, header, ((i, noun, str([noun]), "object") for i, noun in enumerate(NOUNS)))


def write_tail(verbs: Path, nouns: Path, train: Sequence[EK100Clip]) -> None:
    """The lists of rare classes."""
    _write_csv(verbs, ("verb",), ((c,) for c in tail_classes([VERBS.index(x.clip.label.verb) for x in train])))
    _write_csv(nouns, ("noun",), ((c,) for c in tail_classes([NOUNS.index(x.clip.label.noun) for x in train])))


def tail_classes(classes: Sequence[int]) -> list[int]:
    """The smallest classes, which together make up a fifth of the clips at most (EPIC-KITCHENS-100); at least one.

    Of classes of one size the later ones count as smaller.
    """
    counts = Counter(classes)
    smallest = sorted(counts, key=lambda c: (counts[c], -c))
    sums = np.cumsum([counts[c] for c in smallest])
    return sorted(smallest[: max(1, int((sums <= len(classes) / 5).sum()))])


def write_participants(path: Path, participants: Iterable[str]) -> None:
    _write_csv(path, ("participant_id",), ((p,) for p in participants))


def write_reversed_pairs(path: Path, clips: Sequence[EK100Clip]) -> None:
    """Per evaluation clip its own text and that of its time-reversed partner (same noun, the pair's other verb)."""
    rows = [
        {
            "narration_id": c.narration_id,
            "text": evaluation_sentence(c.clip.label),
            "partner_text": evaluation_sentence(c.clip.label.partner),
        }
        for c in clips
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _row(c: EK100Clip) -> list:
    label, start, stop = c.clip.label, c.clip.start, c.clip.stop
    nouns = all_nouns(label)
    times = [_timestamp(start, 3), _timestamp(start, 2), _timestamp(stop, 2)]
    frames = [max(1, int(start * c.fps)), int(stop * c.fps)]
    classes = [NOUNS.index(noun) for noun in nouns]
    verb = [verb_key(label.verb), VERBS.index(label.verb)]
    return [c.narration_id, c.participant, c.video, *times, *frames, evaluation_sentence(label)] + [
        *verb,
        label.noun,
        classes[0],
        list(nouns),
        classes,
    ]


def _timestamp(seconds: float, digits: int) -> str:
    """HH:MM:SS.ss"""
    whole = round(seconds * 10**digits)
    minutes, rest = divmod(whole, 60 * 10**digits)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest / 10**digits:0{digits + 3}.{digits}f}"


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
