"""The demo dataset as EPIC-KITCHENS-100 has it: both splits, retrieval and actions, lists, shared video files."""

import ast
import json
import os
import pickle

import pytest

from avion.data.demo import DemoSize, dataset, ensure_demo_dataset
from avion.data.demo.annotations import _timestamp, relevancy, tail_classes
from avion.data.demo.vocabulary import PAIRS, Label
from avion.data.ek100 import load_relevancy, read_ek100_retrieval, read_sentences
from avion.data.video import VideoStore
from tests.data.demo_case import TINY, decode, rows, seconds

HEADER = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,"
HEADER += "stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
splits = pytest.mark.parametrize("split", ["train", "val"])


def paths_of(demo, split):
    """(clips, sentences, relevancy) of a retrieval split."""
    if split == "train":
        return demo.train_csv, demo.train_sentences, demo.train_relevancy
    return demo.val_csv, demo.val_sentences, demo.relevancy


@splits
def test_clips(demo, split):
    path = paths_of(demo, split)[0]
    clips = rows(path)
    assert path.read_text().splitlines()[0] == HEADER
    assert len(clips) == {"train": 2 * 4 * 3, "val": 2 * 4}[split]
    assert len({row["narration_id"] for row in clips}) == len(clips)
    verbs = {r["key"]: r["id"] for r in rows(demo.verb_classes)}
    nouns = {r["key"]: r["id"] for r in rows(demo.noun_classes)}
    seen: dict[str, int] = {}
    for row in clips:
        number = seen[row["video_id"]] = seen.get(row["video_id"], -1) + 1
        assert row["narration_id"] == f"{row['video_id']}_{number}" and row["video_id"].startswith(
            row["participant_id"]
        )
        folder = demo.ek100_videos / row["participant_id"] / f"{row['video_id']}.MP4"
        assert (folder / "0.MP4").is_file()
        frames, _, fps = decode(folder)
        start, stop = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
        assert 0 <= start < stop <= len(frames) / fps
        assert int(row["start_frame"]) == pytest.approx(start * fps, abs=1.1)
        assert int(row["stop_frame"]) == pytest.approx(stop * fps, abs=1.1)
        assert row["verb_class"] == verbs[row["verb"]] and row["noun_class"] == nouns[row["noun"]]
        listed = ast.literal_eval(row["all_nouns"])
        assert listed[0] == row["noun"]
        assert ast.literal_eval(row["all_noun_classes"]) == [int(nouns[n]) for n in listed]
        assert all(word in row["narration"].split() for word in [*row["verb"].split("-"), *listed])


@splits
def test_relevancy_matrix_follows_the_formula(demo, split):
    csv_path, sentences_path, relevancy_path = paths_of(demo, split)
    clips, sentences = rows(csv_path), rows(sentences_path)
    by_id = {row["narration_id"]: row for row in clips}
    assert sentences_path.name == csv_path.stem + "_sentence.csv"
    assert len({s["narration"] for s in sentences}) == len(sentences) == len({c["narration"] for c in clips})
    matrix = pickle.loads(relevancy_path.read_bytes())
    assert matrix.shape == (len(clips), len(sentences))
    for i, clip in enumerate(clips):
        for j, sentence in enumerate(sentences):
            other = by_id[sentence["narration_id"]]
            assert other["narration"] == sentence["narration"]
            a, b = (set(ast.literal_eval(r["all_noun_classes"])) for r in (clip, other))
            value = ((clip["verb_class"] == other["verb_class"]) + len(a & b) / len(a | b)) / 2
            assert matrix[i, j] == pytest.approx(value, abs=1e-12)
            assert (matrix[i, j] == 1) == (clip["narration"] == sentence["narration"])


def test_action_recognition_has_the_same_clips(demo):
    assert demo.action_train_csv.name == "EPIC_100_train.csv"
    assert (
        demo.action_validation_csv.name == "EPIC_100_validation.csv"
        and demo.validation_csv == demo.action_validation_csv
    )
    assert demo.action_train_csv.read_bytes() == demo.train_csv.read_bytes()
    assert demo.validation_csv.read_bytes() == demo.val_csv.read_bytes()
    trained, judged = ({(r["verb"], r["noun"]) for r in rows(p)} for p in (demo.train_csv, demo.val_csv))
    assert judged == trained  # no action is judged that was never shown


def test_training_clips_are_those_of_the_ego4d_pickle(demo):
    """The same seconds of the same files, under other names and in other words."""
    narrations = pickle.loads(demo.train_pickle.read_bytes())
    clips = rows(demo.train_csv)
    assert len(narrations) == len(clips)
    for (uid, start, stop, text), row in zip(narrations, clips, strict=True):
        assert abs(start - seconds(row["start_timestamp"])) <= 0.006
        assert abs(stop - seconds(row["stop_timestamp"])) <= 0.006
        assert set(row["narration"].split()) - {row["verb"].split("-")[0]} <= set(text.split())
        here = demo.ek100_videos / row["participant_id"] / f"{row['video_id']}.MP4"
        there = demo.train_videos / f"{uid}.mp4"
        assert {p.stem: p.stat().st_ino for p in here.iterdir()} == {p.stem: p.stat().st_ino for p in there.iterdir()}
        assert {p.suffix for p in here.iterdir()} == {".MP4"}


def test_copies_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    demo = ensure_demo_dataset(tmp_path / "demo", size=TINY, workers=1)
    (there,), (here,) = list(demo.train_videos.iterdir()), list((demo.ek100_videos / "P01").glob("P01_0*"))
    assert [p.read_bytes() for p in sorted(here.iterdir())] == [p.read_bytes() for p in sorted(there.iterdir())]
    assert all(p.stat().st_nlink == 1 for p in here.iterdir())


def test_one_root_holds_both_splits(demo):
    store = VideoStore(demo.ek100_videos, decoder="pyav")
    assert demo.val_videos == demo.ek100_videos
    for split in ("train", "val"):
        csv_path, sentences_path, relevancy_path = paths_of(demo, split)
        clips = read_ek100_retrieval(csv_path)
        _, texts = read_sentences(sentences_path)
        assert load_relevancy(relevancy_path, len(clips), len(texts)).shape == (len(clips), 8)
        assert store.read_clip(clips[7].video, clips[7].start, clips[7].end, 4).frames.shape == (4, 96, 128, 3)
        assert len({clip.video for clip in clips}) == {"train": 3, "val": 1}[split]


def test_unseen_participants_are_in_no_training_video(demo):
    (unseen,) = [r["participant_id"] for r in rows(demo.unseen_participants)]
    assert unseen == "P04"
    assert unseen not in {r["participant_id"] for r in rows(demo.train_csv)}
    videos = [task.folder.parent.name for task in dataset._plan("val", 0, DemoSize(), demo)]
    assert 0 < videos.count(unseen) < len(videos) / 2


def test_tail_lists_name_classes_by_number(demo):
    for path, column, classes in (
        (demo.tail_verbs, "verb", demo.verb_classes),
        (demo.tail_nouns, "noun", demo.noun_classes),
    ):
        listed = rows(path)
        assert listed and all(list(row) == [column] for row in listed)
        assert {row[column] for row in listed} < {r["id"] for r in rows(classes)}


def test_tail_classes_are_the_smallest_up_to_a_fifth():
    classes = [0] * 10 + [1] * 1 + [2] * 2 + [3] * 7  # a fifth of 20 clips is 4
    assert tail_classes(classes) == [1, 2]
    assert tail_classes([0] * 6 + [1] * 2 + [2] * 2) == [2]  # both small ones would be two fifths
    assert tail_classes([4, 4, 5, 5]) == [5]  # at least one


def test_relevancy_of_sentences_that_share_some_nouns():
    put, push = PAIRS[0], PAIRS[2]
    mug_on_tray, mug_from_tray = Label(put, "mug", False), Label(put, "mug", True)
    assert relevancy(mug_on_tray, mug_on_tray) == 1
    assert relevancy(mug_on_tray, mug_from_tray) == 0.5
    assert relevancy(mug_on_tray, Label(put, "bowl", False)) == pytest.approx(0.5 + 0.5 / 3)
    assert relevancy(Label(put, "bowl", True), Label(push, "bowl", False)) == pytest.approx(0.25)
    assert relevancy(Label(put, "book", True), Label(push, "pan", False)) == 0


def test_reversed_pairs_name_the_partner_of_the_same_noun(demo):
    clips = {row["narration_id"]: row for row in rows(demo.val_csv)}
    pairs = json.loads(demo.reversed_pairs.read_text())
    assert [p["narration_id"] for p in pairs] == list(clips)
    partner = {"put": "take", "take": "put", "open": "close", "close": "open"}
    for pair in pairs:
        row = clips[pair["narration_id"]]
        assert set(pair) == {"narration_id", "text", "partner_text"} and pair["text"] == row["narration"]
        other = next(r for r in clips.values() if r["narration"] == pair["partner_text"])
        assert (other["verb"], other["noun"]) == (partner[row["verb"]], row["noun"])


def test_timestamps():
    assert _timestamp(0.0, 2) == "00:00:00.00"
    assert _timestamp(3725.456, 2) == "01:02:05.46"
    assert _timestamp(59.996, 2) == "00:01:00.00"
    assert _timestamp(7.0625, 3) == "00:00:07.062"
