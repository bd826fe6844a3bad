"""What the demo dataset talks about: verbs in time-reversed pairs, nouns, and the sentences made of them.

A pair's first verb is shown by a motion whose phase runs from 0 to 1, its second verb by the same motion
backwards. Training sentences are in Ego4D's manner ("#C C puts the mug on the tray", where C is the camera
wearer), evaluation sentences in that of EPIC-KITCHENS-100 ("put mug on tray").
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class VerbPair:
    """Two verbs that are each other played backwards, and the nouns they are shown with.

    `place` is a noun that the sentence mentions too ("" if none), `prepositions` what joins it to the
    forward and to the backward verb.
    """

    forward: str
    backward: str
    nouns: tuple[str, ...]
    place: str = ""
    prepositions: tuple[str, str] = ("", "")


class Label(NamedTuple):
    """One of the things that a clip can show: a pair, an object, and which way time runs."""

    pair: VerbPair
    noun: str
    backward: bool

    @property
    def verb(self) -> str:
        return self.pair.backward if self.backward else self.pair.forward

    @property
    def partner(self) -> "Label":
        """The same object under the reversed verb."""
        return self._replace(backward=not self.backward)


PAIRS: tuple[VerbPair, ...] = (
    VerbPair("put", "take", ("mug", "jar"), "tray", ("on", "from")),
    VerbPair("open", "close", ("book", "drawer")),
    VerbPair("push", "pull", ("bowl", "plate", "pan")),
    VerbPair("lift", "lower", ("mug", "box")),
    VerbPair("insert", "remove", ("book", "knife"), "rack", ("in", "from")),
    VerbPair("fold", "unfold", ("cloth", "towel")),
    VerbPair("fill", "empty", ("mug", "bowl")),
    VerbPair("turn on", "turn off", ("lamp", "tap")),
)

# Class ids are positions in these two tuples.
VERBS: tuple[str, ...] = tuple(verb for pair in PAIRS for verb in (pair.forward, pair.backward))
NOUNS: tuple[str, ...] = tuple(
    dict.fromkeys([noun for pair in PAIRS for noun in pair.nouns] + [pair.place for pair in PAIRS if pair.place])
)
LABELS: tuple[Label, ...] = tuple(
    Label(pair, noun, backward) for pair in PAIRS for noun in pair.nouns for backward in (False, True)
)


def verb_key(verb: str) -> str:
    """The verb as EPIC-KITCHENS-100 writes it in its verb column: "turn-on"."""
    return verb.replace(" ", "-")


def third_person(verb: str) -> str:
    """ "push" -> "pushes", "empty" -> "empties", "turn on" -> "turns on"."""
    head, _, tail = verb.partition(" ")
    if head.endswith("y"):
        head = head[:-1] + "ies"
    elif head.endswith(("sh", "ch", "s", "x")):
        head += "es"
    else:
        head += "s"
    return f"{head} {tail}".strip()


def all_nouns(label: Label) -> tuple[str, ...]:
    """Every noun of the sentence, the object first."""
    return (label.noun, label.pair.place) if label.pair.place else (label.noun,)


def _object_phrase(label: Label, article: str) -> str:
    phrase = f"{article}{label.noun}"
    if label.pair.place:
        phrase += f" {label.pair.prepositions[label.backward]} {article}{label.pair.place}"
    return phrase


def evaluation_sentence(label: Label) -> str:
    """ "put mug on tray"."""
    return f"{label.verb} {_object_phrase(label, '')}"


def training_sentence(label: Label, rng: np.random.Generator) -> str:
    """One of the ways in which narrators write the same thing, most often "#C C puts the mug on the tray"."""
    verb_form = third_person(label.verb) if rng.random() < 0.7 else label.verb
    article = "the " if rng.random() < 0.7 else ""
    return f"#C C {verb_form} {_object_phrase(label, article)}"


def joined_sentence(first: Label, second: Label, rng: np.random.Generator) -> str:
    """Two actions in a row: "#C C puts the mug on the tray, then opens drawer"."""
    return f"{training_sentence(first, rng)}, then {training_sentence(second, rng).removeprefix('#C C ')}"


def option_sentence(first: Label, second: Label) -> str:
    """Two actions in a row as an answer: "C puts the mug on the tray, then opens the drawer"."""
    parts = [f"{third_person(label.verb)} {_object_phrase(label, 'the ')}" for label in (first, second)]
    return f"C {parts[0]}, then {parts[1]}"
