import json

import numpy as np
import pytest

from avion.data.egoschema import LongVideos, Question, frame_ids, read_answers, read_questions, read_sources
from avion.data.video import VideoStore
from avion.errors import UserError
from tests.videos import read_barcode, write_video


def row(uid="a-1", **changes):
    fields = {"q_uid": uid, "google_drive_id": "x", "question": "What is done?"}
    return {**fields, **{f"option {k}": f"Option {k} of {uid}" for k in range(5)}, **changes}


@pytest.fixture
def written(tmp_path):
    def write(content) -> str:
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_questions(written):
    first, second = read_questions(written([row(), row("B_2.x", question="  Why? ")]))
    assert first == Question("a-1", "What is done?", tuple(f"Option {k} of a-1" for k in range(5)))
    assert (second.uid, second.text) == ("B_2.x", "Why?")


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "a list of questions is required, found an empty one"),
        ({"a": 1}, "a list of questions is required, found a dict"),
        (["x"], "question 0: is a str"),
        ([row(), row()], "question 1: q_uid a-1 occurs twice"),
        ([row(), {k: v for k, v in row("b").items() if k != "option 3"}], "question 1: field 'option 3'.* is missing"),
        ([row(**{"option 0": " "})], "question 0: field 'option 0'"),
        ([row(**{"option 4": 7})], "question 0: field 'option 4': a text is required, found '7'"),
        ([row(question=None)], "question 0: field 'question'"),
        ([row("../etc/passwd")], "question 0: field 'q_uid'.*found '../etc/passwd'"),
        ([row("..")], "question 0: field 'q_uid'"),
        ([row("a/b")], "question 0: field 'q_uid'"),
        ([row("")], "question 0: field 'q_uid'"),
        ([row(5)], "question 0: field 'q_uid'"),
        ([row("x" * 300)], "question 0: field 'q_uid'"),
        ("[{", r"not valid JSON \(line 1\)"),
        ("[" * 100_000, "not valid JSON"),
        ('[{"q_uid": "a", "q_uid": "b"}]', "'q_uid' occurs twice"),
    ],
)
def test_bad_questions(written, content, message):
    path = written(content)
    with pytest.raises(UserError, match=message) as error:
        read_questions(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "q.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(UserError, match="q.json: not valid JSON"):
        read_questions(tmp_path / "q.json")
    with pytest.raises(UserError, match="nothing.json: no such file"):
        read_questions(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path)


QUESTIONS = [Question(uid, "?", ("a",) * 5) for uid in ("a", "b", "c")]


def test_answers(written):
    assert read_answers(written({"c": 4, "a": 0}), QUESTIONS) == {"c": 4, "a": 0}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": 5}, "a: a number from 0 to 4 is required, found '5'"),
        ({"a": -1}, "found '-1'"),
        ({"a": True}, "found 'True'"),
        ({"a": "1"}, "found '1'"),
        ({"a": 1.0}, "found '1.0'"),
        ({"a": 1, "x": 2, "y": 3}, "2 of 3 q_uids are not among the questions, first 'x'"),
        ({}, "at least one answer"),
        ([1], "an object of the form"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": NaN}', "found 'nan'"),
    ],
)
def test_bad_answers(written, content, message):
    with pytest.raises(UserError, match=message):
        read_answers(written(content), QUESTIONS)


def test_sources(written):
    content = {"a": {"video_uid": "v1", "starting_sec": 0, "ending_sec": 180}, "z": {"video_uid": "v2"}}
    assert read_sources(written(content)) == {"a": "v1", "z": "v2"}
    for bad in ({}, [1], {"a": "v1"}, {"a": {}}, {"a": {"video_uid": 3}}):
        with pytest.raises(UserError, match="file.json"):
            read_sources(written(bad))


@pytest.mark.parametrize(
    "video, count, sampling, wanted",
    [
        (100, 4, "uniform", [12, 37, 62, 87]),  # segments of 25: their middles, truncated
        (10, 10, "uniform", range(10)),
        (3, 6, "uniform", [0, 0, 1, 1, 2, 2]),  # half a frame each
        (100, 4, "prefix", [0, 1, 2, 3]),
        (4, 4, "prefix", [0, 1, 2, 3]),
        (4, 3, "prefix", [0, 1, 2]),
        (4, 5, "prefix", [0, 1, 2, 2, 3]),  # segments of 0.8: middles 0.4, 1.2, 2, 2.8, 3.6
        (3, 6, "prefix", [0, 0, 1, 1, 2, 2]),
        (3, 7, "prefix", [0, 0, 1, 1, 1, 2, 2]),  # segments of 3/7: middles 3/14, 9/14, 15/14, 1.5, 27/14, 33/14, 39/14
        (1, 2, "prefix", [0, 0]),
        (100, 4, "prefix-hold", [0, 1, 2, 3]),
        (3, 6, "prefix-hold", [0, 1, 2, 2, 2, 2]),
        (1, 2, "uniform", [0, 0]),
    ],
)
def test_frame_ids(video, count, sampling, wanted):
    assert frame_ids(video, count, sampling).tolist() == list(wanted)


def test_8192_frames_of_a_video_of_5400():
    """Segments of 5400 / 8192 frames. Middle i is (2 i + 1) · 675 / 2048, never a whole number."""
    found = frame_ids(5400, 8192, "prefix")
    assert found.tolist() == [(2 * i + 1) * 675 // 2048 for i in range(8192)]
    assert found[:10].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6]  # 0.33 0.99 1.65 2.31 2.97 3.63 4.29 4.94 5.60 6.26
    assert found[-4:].tolist() == [5397, 5398, 5399, 5399]
    numbers, times = np.unique(found, return_counts=True)
    assert numbers.tolist() == list(range(5400)) and set(times.tolist()) == {1, 2}  # each frame once or twice
    assert (found != frame_ids(5400, 8192, "prefix-hold")).sum() == 8189
    assert found.tolist() == frame_ids(5400, 8192, "uniform").tolist()


@pytest.mark.parametrize("count", [5399, 5400, 5401])
def test_prefix_around_the_length_of_the_video(count):
    found = frame_ids(5400, count, "prefix").tolist()
    if count == 5401:  # (2 i + 1) · 5400 / 10802 is i + 0.5 less (2 i + 1) / 10802: the middle frame comes twice
        assert found == [*range(2701), *range(2700, 5400)]
    else:
        assert found == list(range(count))


def test_frame_ids_of_nothing():
    for arguments in ((0, 4, "uniform"), (4, 0, "prefix"), (4, 4, "random")):
        with pytest.raises(UserError):
            frame_ids(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("egoschema")
    write_video(root / "a.mp4", 90, first=200)
    write_video(root / "b.mp4", 20, width=48, height=112, rotation=90)
    (root / "damaged.mp4").write_bytes((root / "a.mp4").read_bytes()[:3000])
    return root


def videos(folder, **changes):
    questions = [Question(uid, "?", ("a",) * 5) for uid in ("a", "b", "damaged", "missing")]
    return LongVideos(questions, folder, **{"size": 64, "sampling": "uniform", **changes})


def shown(sample, count) -> list[int]:
    """The barcodes of a clip's frames."""
    return [read_barcode(sample["frames"][i].permute(1, 2, 0).numpy()) for i in sample["clips"][count]]


@pytest.mark.parametrize("sampling, last", [("uniform", 89), ("prefix", 89), ("prefix-hold", 89)])
def test_each_needed_frame_is_there_once_for_all_counts(tmp_path, sampling, last):
    write_video(tmp_path / "a.mp4", 90, first=200, width=64)
    sample = LongVideos([Question("a", "?", ("a",) * 5)], tmp_path, size=64, sampling=sampling)[0, (4, 7, 200)]
    for count in (4, 7, 200):
        assert shown(sample, count) == (200 + frame_ids(90, count, sampling)).tolist()
    assert sample["frames"].shape == (90, 3, 64, 64) and sample["frames"].dtype.itemsize == 1
    assert sample["error"] == "" and sample["index"] == 0


def test_a_video_is_opened_and_decoded_once(folder, monkeypatch):
    from avion.data import egoschema

    opened, decoded = [], []
    real = egoschema.open_video

    def counted(path, *rest):
        opened.append(path.name)
        reader = real(path, *rest)
        stream = reader.stream_frames
        monkeypatch.setattr(reader, "stream_frames", lambda ids: (decoded.append(i) or (i, f) for i, f in stream(ids)))
        return reader

    monkeypatch.setattr(egoschema, "open_video", counted)
    videos(folder)[0, (8, 16, 32, 64, 128)]
    assert opened == ["a.mp4"]
    wanted = np.unique(np.concatenate([frame_ids(90, n, "uniform") for n in (8, 16, 32, 64, 128)]))
    assert decoded == wanted.tolist()


def test_frames_are_cropped_as_for_other_tasks(folder):
    """The same as a clip of the video store through the evaluation transform."""
    from avion.data.transforms import EvalTransform

    store = VideoStore(folder, layout="whole")
    for index, name, seconds in ((0, "a", 3.0), (1, "b", 20 / 30)):
        clip = store.read_clip(name, 0.0, seconds, 4)
        wanted = EvalTransform(64, fused=True)(clip.frames, None).transpose(0, 1)
        sample = videos(folder)[index, (4,)]
        assert (sample["frames"][sample["clips"][4]] == wanted).all()


@pytest.mark.parametrize("index, name", [(2, "damaged.mp4"), (3, "missing.mp4")])
def test_a_video_that_cannot_be_read(folder, index, name):
    sample = videos(folder)[index, (4,)]
    assert name in sample["error"] and len(sample["frames"]) == 0 and sample["index"] == index


def test_a_wrong_root_or_sampling(folder):
    with pytest.raises(UserError, match="no such folder"):
        videos(folder / "nowhere")
    with pytest.raises(UserError, match="sampling: 'all'"):
        videos(folder, sampling="all")
