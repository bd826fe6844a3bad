"""EgoMCQ's questions, in the form of the released egomcq.json."""

import copy
import json

import pytest

from avion.data.egomcq import read_egomcq
from avion.errors import UserError

UID = "0836e1a5-c2d0-4c9b-9b46-{:012d}"


def clip(video, start, length=0.9):
    return {
        "video_uid": UID.format(video),
        "clip_start": start,
        "clip_end": start + length,
        "clip_text": "#C C moves the right hand",
        "noun": [12],
        "verb": [3],
    }


def question(answer, kind, clips):
    return {
        "answer": answer,
        "query": {"clip_text": "#C C picks a bag #unsure", "video_uid": clips[answer]["video_uid"]},
        "choices": {str(k): c for k, c in enumerate(clips)},
        "types": kind,
    }


QUESTIONS = {
    "0": question(3, 1, [clip(0, 10.5 * k + 0.021) for k in range(5)]),
    "1": question(0, 2, [clip(k, 0.021 if k == 0 else 99.5) for k in range(5)]),
}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_questions_and_their_distinct_clips(tmp_path):
    found = read_egomcq(write(tmp_path / "q.json", QUESTIONS))
    assert found.ids == ("0", "1") and found.queries == ("#C C picks a bag #unsure",) * 2
    assert found.answers.tolist() == [3, 0] and found.types.tolist() == [1, 2]
    assert found.choices.tolist() == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8]]  # one clip is in both questions
    assert len(found.clips) == 9
    shown = found.clips[3]
    assert (shown.video, shown.start, shown.end) == (UID.format(0), 31.521, 32.421)


def test_numbers_may_be_texts(tmp_path):
    content = copy.deepcopy(QUESTIONS)
    content["0"]["choices"]["1"]["clip_start"] = "7.25"
    assert read_egomcq(write(tmp_path / "q.json", content)).clips[1].start == 7.25


@pytest.mark.parametrize(
    "place, value, what",
    [
        (("answer",), 5, "answer: one of 0, 1, 2, 3, 4"), (("answer",), True, "answer"), (("answer",), "3", "answer"),
        (("types",), 3, "types: one of 1, 2"), (("query",), "text", "query: an object"),
        (("query", "clip_text"), " ", "query: clip_text: a text"), (("choices",), {}, "choices: the keys 0 to 4"),
        (("choices", "5"), clip(0, 0), "choices: the keys"), (("choices", "2"), None, "choices: 2: an object"),
        (("choices", "2", "video_uid"), "../../etc", "choices: 2: video is"),
        (("choices", "2", "video_uid"), 7, "choices: 2: video_uid: a text"),
        (("choices", "2", "clip_start"), "soon", "choices: 2: clip_start: a number"),
        (("choices", "2", "clip_end"), 1e9, "choices: 2: end is 1e"),
        (("choices", "2", "clip_end"), None, "choices: 2: clip_end: a number of seconds is required, found nothing"),
    ],
)  # fmt: skip
def test_damaged_questions_cost_a_line(tmp_path, place, value, what):
    content = copy.deepcopy(QUESTIONS)
    inner = content["1"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(UserError, match=f"question 1: {what}"):
        read_egomcq(write(tmp_path / "q.json", content))


@pytest.mark.parametrize("text, what", [("[]", "an object of questions"), ("{}", "an object"), ("{", "not valid JSON")])
def test_damaged_files_cost_a_line(tmp_path, text, what):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(UserError, match=what):
        read_egomcq(tmp_path / "q.json")
