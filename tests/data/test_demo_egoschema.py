"""The demo dataset's EgoSchema: formats, balance, and that nothing but the order of frames tells the options apart."""

import collections
import json
import re
import uuid

import av
import numpy as np
import pytest

from avion.data.demo.egoschema import (
    ACTION_SECONDS,
    SCENES,
    Arrangement,
    SceneTask,
    arrangements,
    film_scene,
    write_questions,
)
from avion.data.demo.vocabulary import PAIRS, Label, option_sentence
from avion.data.tokenizer import tokenize


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The annotations of all eight scenes, without their videos: questions, answers, origins."""
    folder = tmp_path_factory.mktemp("questions")
    paths = [folder / f"{name}.json" for name in ("questions", "answers", "origins")]
    write_questions([SceneTask(i, 3, folder) for i in range(8)], *paths)
    return [json.loads(p.read_text()) for p in paths]


def options_of(question):
    return [question[f"option {k}"] for k in range(5)]


def decode_whole(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


# Formats


def test_questions_answers_and_videos_belong_together(demo):
    questions = json.loads(demo.egoschema_questions.read_text())
    answers = json.loads(demo.egoschema_answers.read_text())
    origins = json.loads(demo.uid_to_ego4d.read_text())
    assert len(questions) == 5
    fields = {"q_uid", "google_drive_id", "question", *(f"option {k}" for k in range(5))}
    assert all(set(q) == fields and all(type(v) is str and v for v in q.values()) for q in questions)
    uids = [q["q_uid"] for q in questions]
    assert len(set(uids)) == 5 and all(uuid.UUID(uid).version == 4 for uid in uids)
    assert list(answers) == uids and all(type(a) is int and 0 <= a < 5 for a in answers.values())
    assert {p.name for p in demo.egoschema_videos.iterdir()} == {f"{uid}.mp4" for uid in uids}
    assert list(origins) == uids
    for origin in origins.values():
        assert set(origin) == {"video_uid", "starting_sec", "ending_sec"}
        assert uuid.UUID(origin["video_uid"]).version == 4 and origin["starting_sec"] < origin["ending_sec"]
        assert not (demo.train_videos / f"{origin['video_uid']}.mp4").exists()


def test_videos_last_a_minute_or_more_in_one_file(demo):
    for path in demo.egoschema_videos.iterdir():
        frames, fps = decode_whole(path)
        assert frames.shape[1:] == (96, 128, 3)
        assert len(frames) / fps == 2 * ACTION_SECONDS >= 60


# Balance


def test_there_are_40_to_50_questions_and_every_place_is_right_equally_often(full):
    questions, answers, _ = full
    assert 40 <= len(questions) <= 50
    counts = collections.Counter(answers.values())
    assert counts == dict.fromkeys(range(5), len(questions) // 5)


def test_every_direction_and_order_is_right_equally_often():
    used = collections.Counter(a for scene in range(8) for a in arrangements(scene))
    assert len(used) == 8 and set(used.values()) == {5}


def test_no_two_options_are_alike_and_directions_leave_one_pair_open():
    for scene in range(8):
        five = arrangements(scene)
        assert len(set(five)) == 5
        shown = collections.Counter(a.backward for a in five)
        assert sorted(shown.values()) == [1, 1, 1, 2]  # every combination of directions, one of them in both orders


def test_the_five_videos_of_a_scene_are_asked_about_the_same_five_options(full):
    """So an answer that is the same for all five, as of who is blind to order, is right for exactly one."""
    questions, answers, _ = full
    for scene in range(8):
        group = questions[5 * scene : 5 * scene + 5]
        assert len({frozenset(options_of(q)) for q in group}) == 1
        assert len({options_of(q)[answers[q["q_uid"]]] for q in group}) == 5
        for blind_choice in options_of(group[0]):
            right = sum(options_of(q).index(blind_choice) == answers[q["q_uid"]] for q in group)
            assert right == 1


# Words


def test_options_read_like_narrations():
    put, open_ = PAIRS[0], PAIRS[1]
    arrangement = Arrangement(second_first=True, backward=(False, True))
    scene = (Label(put, "mug", False), Label(open_, "drawer", False))
    assert option_sentence(*arrangement.of(scene)) == "C closes the drawer, then puts the mug on the tray"
    assert option_sentence(*Arrangement(False, (True, False)).of(scene)) == (
        "C takes the mug from the tray, then opens the drawer"
    )


def test_scenes_have_two_actions_that_cannot_be_mixed_up():
    assert len(SCENES) == 8 == len(set(SCENES))
    for one, two in SCENES:
        assert one.pair != two.pair and one.noun != two.noun


def test_the_answer_says_what_the_video_shows(demo):
    """Which scene's action is on in which half is read from the frames: each half is the take or its reversal."""
    (
        questions,
        answers,
    ) = (json.loads(p.read_text()) for p in (demo.egoschema_questions, demo.egoschema_answers))
    scene = SCENES[0]
    videos = {q["q_uid"]: decode_whole(demo.egoschema_videos / f"{q['q_uid']}.mp4")[0].astype(int) for q in questions}
    filmed = film_scene(0, seed=7)
    told = [options_of(q)[answers[q["q_uid"]]] for q in questions]
    for i, q in enumerate(questions):
        distances = [np.abs(videos[q["q_uid"]] - frames).mean() for frames in filmed]
        assert int(np.argmin(distances)) == i
        assert told[i] == option_sentence(*arrangements(0)[i].of(scene))
    # The words against the pictures: the one that comes first in the words begins like the one that is alone first.
    half = len(filmed[0]) // 2
    first_words = [re.split(", then ", text.removeprefix("C "))[0] for text in told]
    for a in range(5):
        for b in range(5):
            same = np.array_equal(filmed[a][:half], filmed[b][:half])
            assert same == (first_words[a] == first_words[b])


# Time


def test_the_five_videos_hold_the_same_frames_in_another_order(rng):
    videos = film_scene(int(rng.integers(8)), seed=int(rng.integers(2**31)))
    prints = [[hash(frame.tobytes()) for frame in video] for video in videos]
    assert len({tuple(p) for p in prints}) == 5
    assert len({tuple(sorted(p)) for p in prints}) == 1
    assert len(set(prints[0])) > 0.9 * len(prints[0])  # and few of them are alike: there is an order to see


def test_each_half_is_one_action_in_one_direction(rng):
    index, seed = int(rng.integers(8)), int(rng.integers(2**31))
    videos = film_scene(index, seed)
    half = len(videos[0]) // 2
    halves: dict[tuple[int, bool], np.ndarray] = {}
    for video, (second_first, backward) in zip(videos, arrangements(index), strict=True):
        for place, frames in enumerate((video[:half], video[half:])):
            action = 1 - place if second_first else place
            known = halves.setdefault((action, backward[action]), frames)
            np.testing.assert_array_equal(frames, known)
    assert len(halves) == 4
    for action in (0, 1):
        np.testing.assert_array_equal(halves[action, True], halves[action, False][::-1])
        assert np.abs(halves[action, False][0].astype(int) - halves[action, False][-1]).mean() > 0.5


def test_uniform_samples_are_those_of_the_other_order_too(rng):
    """The frames that a model is given are the same set again, for the numbers of frames that divide a half."""
    videos = film_scene(int(rng.integers(8)), seed=int(rng.integers(2**31)))
    for count in (8, 16, 32):
        step = len(videos[0]) // count
        sets = set()
        for video in videos:
            picked = video[step // 2 - 1 :: step], video[step // 2 :: step]
            sets.add(frozenset(hash(f.tobytes()) for pick in picked for f in pick))
        assert len(sets) == 1


def test_another_seed_is_another_scene():
    one, two = (film_scene(0, seed)[0].astype(int) for seed in (0, 1))
    assert np.abs(one - two).mean() > 3


def test_options_fit_the_demo_s_context():
    """With the narrations' "#C " before it, no option is longer than the 16 tokens that the demo's model reads."""
    texts = ["#C " + option_sentence(*a.of(s)) for i, s in enumerate(SCENES) for a in arrangements(i)]
    assert int((tokenize(texts, 77) > 0).sum(dim=1).max()) <= 16
