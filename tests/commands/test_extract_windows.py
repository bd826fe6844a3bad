"""tools/extract_features.py over whole videos: windows, a file per video, several processes, sentences."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avion.commands import extract_features as tool
from avion.constants import NORM_STYLES
from avion.data.tokenizer import tokenize
from avion.data.transforms import EvalTransform
from avion.features import read
from avion.models import model_from_checkpoint
from avion.models.model_clip import VideoClassifier
from avion.weights import save_weights
from tests.models.tiny import tiny_model
from tests.processes import free_port
from tests.threads_at_exit import SAID
from tests.videos import write_video

ROOT = Path(__file__).parents[2]
PREPROCESS = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}
QUICK = "--workers 0 --device cpu --batch-size 5".split()
LENGTHS = {"a": 85, "deep/b": 31, "P01/P01_01": 60, "c": 8}  # frames of 10 per second
WINDOWS = "--window 2 --stride 1 --frames 4".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """whole/, and the same videos in chunks of 3 s: avion/, vms/; a checkpoint."""
    root = tmp_path_factory.mktemp("data")
    for v, (name, count) in enumerate(LENGTHS.items()):
        write_video(root / f"whole/{name}.mp4", count, first=200 * v, fps=10)
        for k, first in enumerate(range(0, count, 30)):
            some = min(30, count - first)
            chunk = write_video(root / f"avion/{name}.mp4/{3 * k}.mp4", some, first=200 * v + first, fps=10)
            link = root / f"vms/{name}/{k:04d}.mp4"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(chunk)
    torch.manual_seed(5)
    save_weights(tiny_model("TIMEMAMBA_VITB16"), root / "checkpoint.pt", PREPROCESS)
    return root


def words(data, out, *flags, layout="whole"):
    given = ["--checkpoint", data / "checkpoint.pt", "--root", data / layout, "--output-dir", out, *QUICK]
    return [str(word) for word in [*given, *flags]]


def run(data, out, *flags, layout="whole"):
    return tool.main(words(data, out, *flags, layout=layout))


def by_hand(data, video, start, end, frames):
    """The model on frames that FFmpeg decodes one after the other, without this project's readers."""
    with av.open(str(data / f"whole/{video}.mp4")) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    edges = np.linspace(round(start * 10), round(end * 10), frames + 1)
    clip = np.stack([pictures[int(middle)] for middle in (edges[:-1] + edges[1:]) / 2])
    model = model_from_checkpoint(data / "checkpoint.pt").eval()
    with torch.no_grad():
        return model.encode_image(EvalTransform(32)(clip, None)[None])[0].numpy()


def test_windows_are_the_model_on_frames_decoded_by_hand(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", *WINDOWS) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 4 videos\n"
    found = read(tmp_path / "out")
    assert sorted(found) == sorted(LENGTHS) and found.settings["window"] == 2 and found.settings["frames"] == 4
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npz")) == ["P01_01.npz", "a.npz", "c.npz"]
    for name, count in LENGTHS.items():
        video, length = found[name], count / 10
        starts = {"a": range(8), "deep/b": range(2), "P01/P01_01": range(5), "c": range(1)}[name]
        assert video.start.tolist() == list(starts) and video.valid.all()
        np.testing.assert_allclose(video.end, np.minimum(np.array(starts) + 2, length))
        assert video.clip.shape == (len(starts), 16) and video.clip.dtype == np.float32
        wanted = np.stack([by_hand(data, name, s, e, 4) for s, e in zip(video.start, video.end, strict=True)])
        apart = np.linalg.norm(video.clip[:, None] - wanted[None], axis=2)
        assert (apart.argmin(axis=1) == np.arange(len(starts))).all()
        # Pixels are scaled and rounded in another order, which moves a feature a little.
        assert (apart.diagonal() < 0.05 * np.linalg.norm(wanted, axis=1)).all()


@pytest.mark.parametrize("layout", ["avion", "vms"])
@pytest.mark.parametrize("workers", [0, 2])
def test_chunked_layouts_and_workers(data, tmp_path, layout, workers):
    chunks = ["--video-chunk-length", "3", "--workers", workers]
    assert run(data, tmp_path / "chunked", *WINDOWS, *chunks, layout=layout) == 0
    assert run(data, tmp_path / "whole", *WINDOWS) == 0
    chunked, whole = read(tmp_path / "chunked"), read(tmp_path / "whole")
    assert sorted(chunked) == sorted(whole)
    for name in whole:
        np.testing.assert_allclose(chunked[name].start, whole[name].start)
        np.testing.assert_allclose(chunked[name].end, whole[name].end)
        apart = np.linalg.norm(chunked[name].clip[:, None] - whole[name].clip[None], axis=2)
        assert (apart.argmin(axis=1) == np.arange(len(apart))).all()  # encoded twice, so not to the bit
        assert (apart.diagonal() < 0.2 * np.linalg.norm(whole[name].clip, axis=1)).all()


def test_fps_says_the_frames_of_a_window(data, tmp_path):
    assert run(data, tmp_path / "fps", "--window", "2", "--fps", "3") == 0
    assert run(data, tmp_path / "frames", "--window", "2", "--frames", "6") == 0
    one, two = read(tmp_path / "fps"), read(tmp_path / "frames")
    assert one.settings["stride"] == 2 and one["a"].start.tolist() == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(one["a"].clip, two["a"].clip)


def test_kinds_formats_and_types(data, tmp_path):
    assert run(data, tmp_path / "all", *WINDOWS, "--features", "clip", "frame", "spatial", "--dtype", "fp16") == 0
    video = read(tmp_path / "all")["a"]
    assert (video.clip.shape, video.frame.shape, video.spatial.shape) == ((8, 16), (8, 4, 32), (8, 4, 4, 32))
    assert video.clip.dtype == np.float16
    assert run(data, tmp_path / "npy", *WINDOWS, "--format", "npy") == 0
    array = np.load(tmp_path / "npy/a.npy")
    np.testing.assert_allclose(array, video.clip, rtol=1e-2, atol=1e-2)
    assert run(data, tmp_path / "pt", *WINDOWS, "--format", "pt", "--dtype", "bf16") == 0
    tensor = torch.load(tmp_path / "pt/P01_01.pt", weights_only=True)
    assert tensor.dtype == torch.bfloat16 and tensor.shape == (5, 16)


def test_a_list_of_clips_with_a_file_per_video(data, tmp_path):
    (tmp_path / "clips.csv").write_text(
        "video,start,end,id\na.mp4,1,3,first\ndeep/b,0,,b1\na.mp4,0,2,second\na.mp4,5,,third\n"
    )
    flags = ["--videos", tmp_path / "clips.csv", "--per-video", "--frames", 4]
    assert run(data, tmp_path / "out", *flags) == 0
    assert run(data, tmp_path / "windows", *WINDOWS) == 0
    found, windows = read(tmp_path / "out"), read(tmp_path / "windows")
    assert list(found) == ["a.mp4", "deep/b"]
    video = found["a.mp4"]
    assert video.start.tolist() == [1, 0, 5] and video.end.tolist() == [3, 2, 8.5]
    assert video.ids == ("first", "second", "third")
    np.testing.assert_allclose(video.clip[:2], windows["a"].clip[[1, 0]], rtol=1e-4, atol=1e-5)
    # Other clips of the first video, the same clip of the second one.
    (tmp_path / "clips.csv").write_text("video,start,end,id\na.mp4,1,3,first\ndeep/b,0,,b1\n")
    stamp = (tmp_path / "out/deep/b.npz").stat().st_mtime_ns
    assert run(data, tmp_path / "out", *flags) == 0
    assert read(tmp_path / "out")["a.mp4"].start.tolist() == [1]
    assert (tmp_path / "out/deep/b.npz").stat().st_mtime_ns == stamp


def test_what_cannot_be_read(data, tmp_path, capsys):
    """A video that is none, and a chunk that is missing: rows keep their place."""
    for k in (0, 6):
        (tmp_path / "v/a.mp4").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"v/a.mp4/{k}.mp4").hardlink_to(data / f"avion/a.mp4/{k}.mp4")
    (tmp_path / "v/bad.mp4").mkdir()
    (tmp_path / "v/bad.mp4/0.mp4").write_bytes(b"no video")
    flags = ["--root", tmp_path / "v", "--video-chunk-length", "3", *WINDOWS]
    assert run(data, tmp_path / "out", *flags) == 1
    printed = capsys.readouterr().out
    assert "unreadable  bad: " in printed and "unreadable  a: 4 of 8 rows, such as: " in printed
    assert f"{tmp_path / 'out'}: 2 videos, 2 with something that cannot be read\n" in printed
    video = read(tmp_path / "out")["a"]
    assert video.valid.tolist() == [True, True, False, False, False, False, True, True]
    assert np.isnan(video.clip[~video.valid]).all() and np.isfinite(video.clip[video.valid]).all()
    assert list(read(tmp_path / "out").errors) == ["bad"]
    assert run(data, tmp_path / "out", *flags) == 1  # told again
    (tmp_path / "v/a.mp4/3.mp4").hardlink_to(data / "avion/a.mp4/3.mp4")
    (tmp_path / "v/bad.mp4/0.mp4").unlink()
    (tmp_path / "v/bad.mp4/0.mp4").hardlink_to(data / "avion/c.mp4/0.mp4")
    assert run(data, tmp_path / "out", *flags, "--retry") == 0
    assert all(video.valid.all() for video in read(tmp_path / "out").values())


def start(data, out, *flags, torchrun=0):
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", torchrun, "--master_port", free_port()]
    command += ["tests/threads_at_exit.py", "tools/extract_features.py", *words(data, out, *flags)]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process):
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        output, _ = process.communicate(timeout=240)
    return process.returncode, output


def same(one, two):
    one, two = read(one), read(two)
    assert sorted(one) == sorted(two)
    for name in one:
        for values, others in ((one[name].start, two[name].start), (one[name].clip, two[name].clip)):
            np.testing.assert_allclose(values, others, rtol=1e-4, atol=1e-5)


def test_processes_of_torchrun_and_of_an_array(data, tmp_path):
    run(data, tmp_path / "alone", *WINDOWS)
    status, output = ended(start(data, tmp_path / "torchrun", *WINDOWS, torchrun=2))
    assert status == 0, output
    assert output.count(f"{tmp_path / 'torchrun'}: 4 videos") == 1 and output.count(f"{SAID}[]") == 2, output
    same(tmp_path / "alone", tmp_path / "torchrun")
    jobs = [start(data, tmp_path / "array", *WINDOWS, "--shard", f"{i}/3") for i in range(3)]
    counts = []
    for job in jobs:
        status, output = ended(job)
        assert status == 0, output
        counts.append(int(re.search(r": (\d) videos\n", output).group(1)))
    assert counts == [2, 1, 1]
    same(tmp_path / "alone", tmp_path / "array")
    assert run(data, tmp_path / "array", *WINDOWS) == 0  # nothing is left to do


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on(data, tmp_path, how):
    for i in range(60):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / f"many/{i:02d}.mp4").hardlink_to(data / "whole/a.mp4")
    flags = ["--root", tmp_path / "many", *WINDOWS]
    process = start(data, tmp_path / "out", *flags)
    give_up = time.monotonic() + 120
    while process.poll() is None and not list((tmp_path / "out").glob("*.npz")) and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(how)
    status, output = ended(process)
    assert status == (75 if how == signal.SIGTERM else -9), output
    files = sorted((tmp_path / "out").glob("*.npz"))
    assert 0 < len(files) < 60 and all(np.load(path)["clip"].shape == (8, 16) for path in files)
    if how == signal.SIGTERM:
        assert f"{60 - len(files)} videos left" in output
    stamps = {path: path.stat().st_mtime_ns for path in files[:-1]}  # the last may lack its line
    assert run(data, tmp_path / "out", *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    found = read(tmp_path / "out")
    assert len(found) == 60
    for name in found:
        np.testing.assert_allclose(found[name].clip, found["00"].clip, rtol=1e-4, atol=1e-5)


# ---- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "csv"])
def test_features_of_sentences(data, tmp_path, form):
    sentences = ["#C C opens the drawer", "#C C folds a cloth", "Größe"]
    if form == "text":
        (tmp_path / "list.txt").write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
        path = tmp_path / "list.txt"
    else:
        path = tmp_path / "list.csv"
        path.write_text("narration_id,narration\n" + "".join(f"{i},{s}\n" for i, s in enumerate(sentences)))
    assert run(data, tmp_path / "out", "--texts", path, "--batch-size", "2") == 0
    found = np.load(tmp_path / "out/texts.npz")["text"]
    model = model_from_checkpoint(data / "checkpoint.pt").eval()
    with torch.no_grad():
        wanted = model.encode_text(tokenize(sentences, 16, 512)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out/texts.json").read_text())["sentences"] == sentences
    stamp = (tmp_path / "out/texts.npz").stat().st_mtime_ns
    assert run(data, tmp_path / "out", "--texts", path, *WINDOWS) == 0  # videos beside them
    assert (tmp_path / "out/texts.npz").stat().st_mtime_ns == stamp and len(read(tmp_path / "out")) == 4


def test_other_sentences_and_classifiers_are_refused(data, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("one\n")
    assert run(data, tmp_path / "out", "--texts", tmp_path / "list.txt") == 0
    (tmp_path / "list.txt").write_text("two\n")
    assert run(data, tmp_path / "out", "--texts", tmp_path / "list.txt") == 2
    assert "texts.json: is of other sentences or settings; give another --output-dir" in capsys.readouterr().err
    towers = tiny_model("TIMEMAMBA_VITB16")
    save_weights(VideoClassifier(towers.visual, 0.5, 6, config=towers.config), tmp_path / "c.pt", PREPROCESS)
    flags = ["--checkpoint", tmp_path / "c.pt", "--texts", tmp_path / "list.txt"]
    assert run(data, tmp_path / "out2", *flags) == 2
    assert "is a classifier and has no text tower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--videos: not given; name a list of videos, or give --window or --texts"),
        (["--window", "0"], "--window: found '0'"),
        (["--window", "nan"], "--window: found 'nan'"),
        (["--stride", "1", "--videos", "x"], "--stride: is of the windows of --window, which is not given"),
        (["--window", "2", "--fps", "3", "--frames", "4"], "--fps and --frames: both say how many frames"),
        (["--window", "0.1", "--fps", "3"], "--fps 3: gives a window of 0.1 s 0 frames"),
        (["--window", "2", "--format", "npy", "--features", "clip", "frame"], "--format npy: holds one array"),
        (["--videos", "x", "--format", "pt"], "--format pt: holds one array per video; give --window or --per-video"),
        (["--window", "2", "--shard", "3/3"], "--shard 3/3: expected I/N"),
        (["--window", "2", "--root", "gone"], "video root gone: no such folder"),
        (["--texts", "gone.txt"], "--texts gone.txt: no such file"),
    ],
)
def test_mistakes_are_one_line_and_status_2(data, tmp_path, capsys, flags, message):
    assert run(data, tmp_path / "out", *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("tools/extract_features.py: error: ") and message in lines[0]


def test_the_lines_in_the_docs_run(data, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/features.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n([^`]*?avion\.features[^`]*?)```", text)
    assert len([line for line in block.splitlines() if line.strip()]) <= 5
    assert run(data, tmp_path / "features", *WINDOWS) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and "a (8, 16) 0.0 8.5 True" in printed
