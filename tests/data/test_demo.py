"""The embedded demo dataset: formats, time reversal, determinism, and how it is put in place."""

import json
import multiprocessing
import pickle
import re
import subprocess
import sys
import uuid
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from avion.data.demo import DemoPaths, DemoSize, dataset, ensure_demo_dataset
from avion.data.demo.backdrop import draw_room
from avion.data.demo.film import film_take, film_video
from avion.data.demo.vocabulary import LABELS, NOUNS, PAIRS, VERBS, Label, third_person, training_sentence
from avion.data.ego4d import read_ego4d
from avion.data.ek100 import load_relevancy, read_ek100_retrieval, read_sentences, sentence_path
from avion.data.video import VideoStore
from avion.errors import UserError
from tests.data.demo_case import SMALL, TINY, decode, files, rows, seconds

ROOT = Path(__file__).parents[2]


# Formats


def test_training_annotations_and_chunks(demo):
    narrations = pickle.loads(demo.train_pickle.read_bytes())
    assert type(narrations) is list and len(narrations) == 2 * 4 * 3
    videos = {row[0] for row in narrations}
    assert {p.name for p in demo.train_videos.iterdir()} == {f"{v}.mp4" for v in videos}
    crossing, rates = 0, set()
    for video in videos:
        assert uuid.UUID(video).version == 4
        folder = demo.train_videos / f"{video}.mp4"
        frames, counts, fps = decode(folder)
        assert {p.name for p in folder.iterdir()} == {f"{15 * k}.mp4" for k in range(len(counts))}
        assert len(counts) >= 2 and counts[:-1] == [15 * fps] * (len(counts) - 1) and 0 < counts[-1] < 15 * fps
        assert frames.shape[1:] == (96, 128, 3)
        rates.add(fps)
        end = 0.0
        for _, start, stop, text in sorted(row for row in narrations if row[0] == video):
            assert type(start) is float and type(stop) is float and type(text) is str
            assert end <= start < stop <= len(frames) / fps and 1.0 <= stop - start <= 3.0
            assert re.fullmatch(r"#C C [a-z ]+", text)
            crossing += start // 15 != stop // 15
            end = stop
    assert len(rates) == 3
    assert crossing > 0


def test_long_narrations_join_two_clips_in_a_row(demo):
    single = {(row[0], row[1]): row for row in pickle.loads(demo.train_pickle.read_bytes())}
    ends = {(row[0], row[2]): row for row in single.values()}
    long = pickle.loads(demo.long_train_pickle.read_bytes())
    assert len(long) == len(single) // 2
    words = re.compile(r"#C C (\w+) .*, then (\w+) .*")
    for video, start, stop, text in long:
        one, two = single[video, start], ends[video, stop]
        between = [row for row in single.values() if row[0] == video and one[1] < row[1] < two[1]]
        assert one[2] < two[1] and not between
        # The wording is drawn anew, so compare the verbs without their endings.
        told = [word.rstrip("s") for word in words.fullmatch(text).groups()]
        assert told == [row[3].split()[2].rstrip("s") for row in (one, two)]
    assert len(read_ego4d(demo.train_pickle, demo.long_train_pickle)) == len(single) + len(long)


def test_chunks_are_h264_with_close_keyframes(demo):
    path = next(demo.train_videos.glob("*.mp4/0.mp4"))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        kinds = [(f.key_frame, f.pict_type) for f in container.decode(stream)]
    keys = [i for i, (key, _) in enumerate(kinds) if key]
    assert keys == list(range(0, len(kinds), 15))
    assert not any(kind == av.video.frame.PictureType.B for _, kind in kinds)


def test_the_project_s_readers_read_it(demo):
    table = read_ego4d(demo.train_pickle)
    store = VideoStore(demo.train_videos, decoder="pyav")
    crossing = next(i for i in range(len(table)) if table[i].start // 15 != table[i].end // 15)
    for row in (table[0], table[crossing]):
        frames, _, fps = decode(demo.train_videos / f"{row.video}.mp4")
        clip = store.read_clip(row.video, row.start, row.end, 4)
        assert clip.clamped == 0
        middles = [(row.start + (row.end - row.start) * (k + 0.5) / 4) * fps for k in range(4)]
        for frame, middle in zip(clip.frames, middles, strict=True):
            near = frames[max(0, int(middle) - 1) : int(middle) + 2].astype(int)
            assert np.abs(near - frame).mean(axis=(1, 2, 3)).min() < 0.1
    clips = read_ek100_retrieval(demo.val_csv)
    _, texts = read_sentences(sentence_path(demo.val_csv))
    assert load_relevancy(demo.relevancy, len(clips), len(texts)).shape == (8, 8)
    store = VideoStore(demo.val_videos, decoder="pyav")
    assert store.read_clip(clips[7].video, clips[7].start, clips[7].end, 4).frames.shape == (4, 96, 128, 3)


# Words


def test_sentences():
    assert [third_person(v) for v in ("put", "push", "empty", "turn on", "close")] == [
        "puts",
        "pushes",
        "empties",
        "turns on",
        "closes",
    ]
    rng = np.random.default_rng(0)
    drawn = [training_sentence(Label(PAIRS[0], "mug", True), rng) for _ in range(200)]
    assert set(drawn) == {
        f"#C C {verb} {article}mug from {article}tray" for verb in ("take", "takes") for article in ("", "the ")
    }
    assert max(set(drawn), key=drawn.count) == "#C C takes the mug from the tray"


def test_classes_and_combinations_are_consistent():
    assert len(VERBS) == len(set(VERBS)) == 2 * len(PAIRS) == 16
    assert len(NOUNS) == len(set(NOUNS))
    assert len(set(LABELS)) == len(LABELS) == 2 * sum(len(p.nouns) for p in PAIRS)
    assert all(label.partner in LABELS and label.partner.partner == label for label in LABELS)


def test_every_evaluated_sentence_is_trained(tmp_path):
    """Both splits of the full-size plan deal every combination, equally often."""
    size = DemoSize()
    for split, takes in (("train", size.train_takes), ("val", size.val_takes)):
        dealt = [label for task in dataset._plan(split, 0, size, DemoPaths(tmp_path)) for label in task.labels]
        assert {label: dealt.count(label) for label in dealt} == {x: takes for x in LABELS if not x.backward}


# Time


def test_a_clip_is_its_partner_backwards_to_the_pixel(rng):
    """Every take is shown in both directions; the annotated frames are the same ones in the opposite order."""
    labels = [LABELS[i] for i in (0, 12, 20, 32)]
    video = film_video(labels, np.random.default_rng(rng.integers(2**32)), fps=10)
    assert len(video.clips) == 8
    for label in labels:
        runs = {}
        for backward in (False, True):
            (clip,) = (c for c in video.clips if c.label == label._replace(backward=backward))
            inside = np.arange(len(video.frames)) + 0.5
            runs[backward] = video.frames[(inside > clip.start * 10) & (inside < clip.stop * 10)]
        assert len(runs[False]) >= 10
        np.testing.assert_array_equal(runs[True], runs[False][::-1])
        assert (runs[True] != runs[False]).mean() > 0.01  # and the order matters


def test_the_encoder_keeps_the_reversal(demo):
    """Decoded, a clip is still nearer to its reversed partner than the partner played as it is."""
    clips = rows(demo.val_csv)
    checked = 0
    for row in clips:
        (pair,) = (p for p in json.loads(demo.reversed_pairs.read_text()) if p["narration_id"] == row["narration_id"])
        other = next(r for r in clips if r["narration"] == pair["partner_text"])
        if row["video_id"] != other["video_id"]:
            continue
        frames, _, fps = decode(demo.val_videos / row["participant_id"] / f"{row['video_id']}.MP4")
        (a, a_stop), (b, b_stop) = (
            [round(seconds(r[k]) * fps) for k in ("start_timestamp", "stop_timestamp")] for r in (row, other)
        )
        length = min(a_stop - a, b_stop - b)
        one, two = frames[a : a + length].astype(float), frames[b_stop - length : b_stop].astype(float)
        assert np.abs(one - two[::-1]).mean() < 0.5 * np.abs(one - two).mean()
        checked += 1
    assert checked == 8


def test_start_and_end_are_alike(rng):
    """The hand is as much in the picture at the beginning of the clips as at their end, and pauses are alike."""
    starts, stops, hands = [], [], []
    for seed in rng.integers(2**32, size=16):
        draw = np.random.default_rng(seed)
        take = film_take(LABELS[2 * int(seed % (len(LABELS) // 2))], draw_room(draw), draw, fps=10)
        starts.append(take.start)
        stops.append(len(take.frames) / 10 - take.stop)
        first, last = round(take.start * 10), round(take.stop * 10) - 1
        pairs = ((take.frames[first], take.ends[0]), (take.frames[last], take.ends[1]))
        hands.append([(np.abs(a.astype(int) - b).max(axis=2) > 40).mean() for a, b in pairs])
    assert abs(np.mean(starts) - np.mean(stops)) < 0.1
    first, last = np.array(hands).T
    assert first.mean() > 0.02 and last.mean() > 0.02
    # Not to the pixel: an object that moves away from the hand leaves it more of the picture.
    assert 0.4 < first.mean() / last.mean() < 2.5


@pytest.mark.parametrize("label", LABELS[::2], ids=lambda x: f"{x.verb}-{x.noun}".replace(" ", "-"))
def test_every_action_changes_the_picture(label, rng):
    draw = np.random.default_rng(rng.integers(2**32))
    take = film_take(label, draw_room(draw), draw, fps=5)
    assert take.frames.shape[1:] == (96, 128, 3) and take.frames.dtype == np.uint8
    changed = np.abs(take.ends[0].astype(int) - take.ends[1]).max(axis=2) > 40
    assert changed.mean() > 0.03
    inner = changed[16:, 16:-16]  # what a central square crop sees
    assert inner.sum() > 0.6 * changed.sum()


# Making it


def test_same_seed_same_bytes_whatever_the_workers(demo, tmp_path):
    again = ensure_demo_dataset(tmp_path / "again", seed=7, size=SMALL, workers=2)
    one, two = files(demo.root), files(again.root)
    assert list(one) == list(two)
    for name in one:
        if name.lower().endswith(".mp4"):
            continue
        assert one[name] == two[name], name
    for folder in demo.train_videos.iterdir():
        frames, _, _ = decode(folder)
        np.testing.assert_array_equal(frames, decode(again.train_videos / folder.name)[0])


def test_another_seed_films_something_else(tmp_path):
    made = [ensure_demo_dataset(tmp_path / str(s), seed=s, size=TINY, workers=1) for s in (0, 1)]
    assert made[0].train_pickle.read_bytes() != made[1].train_pickle.read_bytes()
    frames = [decode(next(p.train_videos.iterdir()))[0][5].astype(int) for p in made]
    assert np.abs(frames[0] - frames[1]).mean() > 5


def test_a_finished_dataset_is_left_alone_and_another_one_replaced(tmp_path, monkeypatch):
    root = tmp_path / "demo"
    paths = ensure_demo_dataset(root, size=TINY, workers=1)
    (root / "mark").write_text("still here")
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_make", lambda *a: pytest.fail("made again"))
        assert ensure_demo_dataset(str(root), size=TINY) == paths
    before = files(root)
    monkeypatch.setattr(dataset, "_fingerprint", lambda: "a later generator")
    ensure_demo_dataset(root, size=TINY, workers=1)
    after = files(root)
    assert set(before) - set(after) == {"mark"}
    assert [name for name in after if after[name] != before[name]] == ["demo.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo", "demo.lock"]


def test_the_fingerprint_covers_every_source_file():
    original = dataset._fingerprint()
    assert original == dataset._fingerprint()
    copy = ROOT / "avion" / "data" / "demo"
    assert len(list(copy.glob("*.py"))) >= 8


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    root = tmp_path / "demo"
    ensure_demo_dataset(root, size=TINY, workers=1)
    kept = files(root)

    def fail(*_):
        raise RuntimeError("out of film")

    monkeypatch.setattr(dataset, "film", fail)
    with pytest.raises(RuntimeError, match="out of film"):
        ensure_demo_dataset(root, seed=3, size=TINY, workers=1)
    assert files(root) == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo", "demo.lock"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".demo.draft").mkdir()
    (tmp_path / ".demo.draft" / "half").write_text("x")
    paths = ensure_demo_dataset(tmp_path / "demo", size=TINY, workers=1)
    assert paths.stamp.is_file() and not (paths.root / "half").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_somebody_else_s_folder_is_refused(tmp_path, kind):
    root = tmp_path / "mine"
    if kind == "folder":
        root.mkdir()
        (root / "thesis.txt").write_text("do not touch")
    else:
        root.write_text("do not touch")
    with pytest.raises(UserError, match="mine holds something else") as caught:
        ensure_demo_dataset(root, size=TINY, workers=1)
    assert "\n" not in str(caught.value)
    assert "do not touch" in ((root / "thesis.txt") if kind == "folder" else root).read_text()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(UserError, match=r"blocked.*folder that can be written") as caught:
        ensure_demo_dataset(tmp_path / "blocked" / "demo", size=TINY, workers=1)
    assert "\n" not in str(caught.value)


def test_the_reported_size_counts_links_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        paths = ensure_demo_dataset(tmp_path / "demo", size=TINY, workers=1)
    sizes = {p.stat().st_ino: p.stat().st_size for p in paths.root.rglob("*") if p.is_file()}
    assert len(sizes) < sum(p.is_file() for p in paths.root.rglob("*"))
    assert f"{sum(sizes.values()) / 1e6:.1f} MB" in caplog.text


def _ensure_and_count(root: str, queue) -> None:
    made = []
    original = dataset._make
    dataset._make = lambda *args: (made.append(1), original(*args))
    paths = ensure_demo_dataset(root, size=TINY, workers=1)
    queue.put((len(made), len(pickle.loads(paths.train_pickle.read_bytes()))))


def test_processes_that_ask_at_once_make_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_ensure_and_count, args=(str(tmp_path / "demo"), queue)) for _ in range(3)]
    for p in processes:
        p.start()
    results = [queue.get(timeout=200) for _ in processes]
    for p in processes:
        p.join(60)
    assert sum(made for made, _ in results) == 1
    assert [clips for _, clips in results] == [2, 2, 2]


# The tool and the picture


def test_the_tool_reports_a_user_mistake_in_one_line(tmp_path):
    (tmp_path / "taken").write_text("x")
    command = [sys.executable, "tools/make_demo_data.py", "--root", str(tmp_path / "taken")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "holds something else" in done.stderr


def test_contact_sheet_shows_every_pair():
    path = ROOT / "docs" / "images" / "demo_contact_sheet.png"
    assert path.stat().st_size < 600_000
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    paper = pixels[0, 0]
    is_frame = (np.abs(pixels - paper).max(axis=2) > 12).mean(axis=1) > 0.9  # rows of pixels that cross pictures
    starts = np.flatnonzero(is_frame[1:] & ~is_frame[:-1])
    assert len(starts) == len(PAIRS)
