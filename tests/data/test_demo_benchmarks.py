"""The demo dataset's files for the zero-shot benchmarks, through the readers of the real files and by hand."""

import json
import re

import numpy as np

from avion.data.captions import read_narrations
from avion.data.charades_ego import read_charades_classes, read_charades_ego
from avion.data.demo import ensure_demo_dataset
from avion.data.demo.vocabulary import LABELS
from avion.data.egomcq import read_egomcq
from avion.data.egtea import read_egtea_classes, read_egtea_split
from tests.data.demo_case import TINY, decode, rows, seconds
from tests.data.test_demo_egoschema import decode_whole


def test_egtea_has_the_frames_of_the_evaluation_clips(demo):
    classes = read_egtea_classes(demo.egtea_classes)
    assert len(classes) == len(LABELS) == 34 and classes[0] == "put mug on tray" and classes[-1] == "turn off tap"
    split = read_egtea_split(demo.egtea_split, len(classes))
    clips = rows(demo.val_csv)
    assert 8 <= len(split.clips) <= 3 * 8 and len(set(split.clips)) == len(split.clips)
    for clip, video, label in zip(split.clips, split.videos, split.labels, strict=True):
        first, last = map(int, re.search(r"-F(\d{6})-F(\d{6})$", clip).groups())
        participant, recording, _ = clip.split("-")[:3]
        name = f"{participant}_{recording[1:]}"
        frames, _, fps = decode(demo.ek100_videos / participant / f"{name}.MP4")
        (own,) = [
            c for c in clips if c["video_id"] == name and abs(seconds(c["start_timestamp"]) * fps - first) <= 0.51
        ]
        assert own["narration"] == classes[label]
        found = decode_whole(demo.egtea_clips / f"{video}.mp4")[0]
        assert len(found) == last - first
        assert np.abs(found.astype(int) - frames[first:last]).mean() < 4  # encoded once more


def test_charades_ego_labels_both_actions_of_egoschemas_videos(demo):
    classes = read_charades_classes(demo.charades_classes)
    split = read_charades_ego(demo.charades_split, classes)
    questions = {q["q_uid"]: q for q in json.loads(demo.egoschema_questions.read_text())}
    answers = json.loads(demo.egoschema_answers.read_text())
    assert {row.video for row in split.videos} == set(questions) and (split.labels.sum(axis=1) == 2).all()
    names = list(classes.values())
    for row in rows(demo.charades_split):
        right = questions[row["id"]][f"option {answers[row['id']]}"]  # "C fills the bowl, then turns on the tap"
        parts = right.replace("the ", "").removeprefix("C ").split(", then ")
        shown = [names[int(action.split()[0][1:])].lower() for action in row["actions"].split(";")]
        for said, name in zip(parts, shown, strict=True):
            assert said.split()[-1] == name.split()[-1] and said.split()[0][:3] == name.split()[0][:3]


def test_egomcqs_questions_have_one_right_clip(demo):
    questions = read_egomcq(demo.egomcq)
    content = json.loads(demo.egomcq.read_text())
    spoken = {
        (f"{c['participant_id']}/{c['video_id']}", round(seconds(c["start_timestamp"]), 1)): c["narration"]
        for c in rows(demo.val_csv)
    }
    assert len(content) == len(questions.ids) >= 8
    for i, row in enumerate(content.values()):
        choices = [row["choices"][str(k)] for k in range(5)]
        assert row["query"] == choices[row["answer"]]
        texts = [spoken[c["video_uid"], round(c["clip_start"], 1)] for c in choices]
        assert len(set(texts)) == 5  # five different actions
        videos = {c["video_uid"] for c in choices}
        assert len(videos) == (1 if row["types"] == 1 else 5)
        assert row["query"]["clip_text"].split()[-1] == texts[row["answer"]].split()[-1]
        assert len(set(questions.choices[i])) == 5


def test_captions_are_two_of_each_clip(demo):
    table = read_narrations([demo.captions])
    assert 4 <= len(table) <= 8 and all(1 <= len(row.texts) <= 2 for row in table)
    assert all(text.startswith("#C C ") for row in table for text in row.texts)


def test_a_dataset_of_one_video_has_files_too(tmp_path):
    demo = ensure_demo_dataset(tmp_path / "demo", size=TINY, workers=1)
    assert json.loads(demo.egomcq.read_text()) == {}  # two clips make no question
    assert len(read_egtea_split(demo.egtea_split, 34).clips) == 2
