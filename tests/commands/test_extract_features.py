"""tools/extract_features.py on small videos and models: lists, formats, broken videos, kills and restarts."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avion.commands import extract_features as tool
from avion.constants import NORM_STYLES
from avion.engine.features import extract, load_clip
from avion.models import model_from_checkpoint
from avion.models.model_clip import VideoClassifier
from avion.weights import save_weights
from tests.models.tiny import tiny_model
from tests.videos import write_video

ROOT = Path(__file__).parents[2]
PREPROCESS = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}
QUICK = "--workers 0 --device cpu --shard-size 3 --batch-size 2".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven videos, the fourth of them broken; a checkpoint; list.txt."""
    root = tmp_path_factory.mktemp("data")
    for i in range(7):
        write_video(root / f"videos/{i}.mp4", 12 + i, first=100 * i, fps=6)
    (root / "videos/3.mp4").write_bytes(b"no video")
    (root / "list.txt").write_text("".join(f"{i}.mp4\n" for i in range(7)))
    (root / "good.txt").write_text("video,start,end\n0.mp4,0.5,1.5\n6.mp4,0,2\n")
    torch.manual_seed(3)
    save_weights(tiny_model("TIMEMAMBA_VITB16"), root / "checkpoint.pt", PREPROCESS)
    return root


def run(data, out, *flags, videos="list.txt"):
    words = ["--checkpoint", data / "checkpoint.pt", "--videos", data / videos, "--root", data / "videos"]
    return tool.main([*map(str, [*words, "--output-dir", out]), *QUICK, *flags])


def shards(out):
    """All rows: {kind: {row: array}}."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted(out.glob("0*")):
        arrays = np.load(path) if path.suffix == ".npz" else {k: v.float().numpy() for k, v in load_file(path).items()}
        for kind in set(arrays) - {"row", "valid"}:
            found.setdefault(kind, {}).update(
                zip(np.asarray(arrays["row"]).astype(int).tolist(), arrays[kind], strict=True)
            )
    return found


def test_features_of_a_list_with_a_broken_video(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", *"--features clip spatial frame --frames 6".split()) == 1
    printed = capsys.readouterr().out
    assert "unreadable  row 3: " in printed and "3.mp4: is not a readable video" in printed
    found = shards(tmp_path / "out")
    assert {k: sorted(rows) for k, rows in found.items()} == dict.fromkeys(
        ("clip", "frame", "spatial"), [0, 1, 2, 3, 4, 5, 6]
    )
    for kind, rows in found.items():
        assert [row for row, values in rows.items() if np.isnan(values).any()] == [3], kind
        assert np.isnan(rows[3]).all()
    assert np.load(tmp_path / "out/00001.npz")["valid"].tolist() == [False, True, True]
    model = model_from_checkpoint(data / "checkpoint.pt")
    for row in (0, 5):
        wanted = extract(model, load_clip(data / f"videos/{row}.mp4", 6, model))
        for kind, values in wanted.items():
            assert found[kind][row].dtype == np.float32
            np.testing.assert_allclose(found[kind][row], values[0].numpy(), rtol=1e-4, atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "out/index.jsonl").read_text().splitlines()]
    assert [r["video"] for r in rows] == [f"{i}.mp4" for i in range(7)]
    assert "error" in rows[3] and [r["shard"] for r in rows] == ["00000.npz"] * 3 + ["00001.npz"] * 3 + ["00002.npz"]


def test_formats_and_types(data, tmp_path, capsys):
    assert run(data, tmp_path / "plain", videos="good.txt") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'plain'}: 2 rows\n"
    plain = shards(tmp_path / "plain")
    assert set(plain) == {"clip"} and plain["clip"][0].shape == (16,)
    for i, (flags, tolerance) in enumerate(
        [("--format safetensors", 0), ("--dtype fp16", 1e-3), ("--dtype bf16 --format safetensors", 8e-3)]
    ):
        assert run(data, tmp_path / str(i), *flags.split(), videos="good.txt") == 0
        for row, values in shards(tmp_path / str(i))["clip"].items():
            np.testing.assert_allclose(values.astype(np.float32), plain["clip"][row], rtol=tolerance, atol=tolerance)
    stored = np.load(tmp_path / "1/00000.npz")["clip"].dtype
    assert stored == np.float16
    assert load_file(tmp_path / "2/00000.safetensors")["clip"].dtype == torch.bfloat16


def test_batches_and_workers_change_nothing(data, tmp_path):
    run(data, tmp_path / "a", "--features", "clip", "frame")
    run(data, tmp_path / "b", *"--features clip frame --batch-size 5 --shard-size 100 --workers 2".split())
    a, b = shards(tmp_path / "a"), shards(tmp_path / "b")
    for kind in ("clip", "frame"):
        assert sorted(a[kind]) == sorted(b[kind])
        for row in a[kind]:
            np.testing.assert_allclose(a[kind][row], b[kind][row], rtol=1e-4, atol=1e-5)


def test_annotations_and_chunks(data, tmp_path):
    for k in range(2):
        chunk = write_video(tmp_path / f"ek/P01/P01_01.MP4/{3 * k}.MP4", 18, first=18 * k, fps=6)
        # A copy: encoding the same frames twice does not always give the same pixels.
        (tmp_path / "ego/uid.mp4").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(chunk, tmp_path / f"ego/uid.mp4/{3 * k}.mp4")
    (tmp_path / "clips.csv").write_text(
        "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration\n"
        "P01_01_0,P01,P01_01,00:00:02.00,00:00:04.00,put cup\n"
    )
    (tmp_path / "clips.pkl").write_bytes(pickle.dumps([("uid", 2.0, 4.0, "#C C puts the cup")]))
    common = ["--checkpoint", str(data / "checkpoint.pt"), "--video-chunk-length", "3", *QUICK]
    for kind, videos in (("ek", "clips.csv"), ("ego", "clips.pkl")):
        words = ["--videos", tmp_path / videos, "--root", tmp_path / kind, "--output-dir", tmp_path / f"out_{kind}"]
        assert tool.main([*common, *map(str, words)]) == 0
    one, two = (shards(tmp_path / f"out_{kind}")["clip"][0] for kind in ("ek", "ego"))
    np.testing.assert_array_equal(one, two)
    (entry,) = [json.loads(line) for line in (tmp_path / "out_ek/index.jsonl").read_text().splitlines()]
    wanted = {"row": 0, "video": "P01/P01_01", "start": 2.0, "end": 4.0, "id": "P01_01_0", "shard": "00000.npz"}
    assert entry == {**wanted, "position": 0}


def test_a_fine_tuned_classifier(data, tmp_path):
    towers = tiny_model("TIMEMAMBA_VITB16")
    model = VideoClassifier(towers.visual, 0.5, 6, config=towers.config)
    save_weights(model, tmp_path / "classifier.pt", PREPROCESS)
    words = ["--videos", data / "good.txt", "--root", data / "videos", "--output-dir", tmp_path / "out"]
    assert tool.main([*map(str, ["--checkpoint", tmp_path / "classifier.pt", *words]), *QUICK]) == 0
    assert shards(tmp_path / "out")["clip"][0].shape == (32,)  # what the head reads


def test_a_killed_run_leaves_whole_shards_and_goes_on(data, tmp_path):
    """SIGKILL as soon as a first shard is there; what is done again equals an undisturbed run."""
    (data / "long.txt").write_text("".join(f"{i % 3}.mp4,0.{i:03d},1.5\n" for i in range(160)))
    out = tmp_path / "out"
    words = ["--checkpoint", data / "checkpoint.pt", "--videos", data / "long.txt", "--root", data / "videos"]
    command = [sys.executable, "tools/extract_features.py", *map(str, [*words, "--output-dir", out]), *QUICK]
    command += ["--shard-size", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not list(out.glob("0*.npz")):
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read().decode()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = sorted(out.glob("0*.npz"))
    assert 0 < len(done) < 80
    whole = [len(np.load(path)["row"]) for path in done]
    assert set(whole) == {2}
    stamps = {path: path.stat().st_mtime_ns for path in done[:-1]}  # the last may lack its index lines
    assert run(data, out, "--shard-size", "2", videos="long.txt") == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert run(data, tmp_path / "other", "--shard-size", "2", videos="long.txt") == 0
    one, two = shards(out)["clip"], shards(tmp_path / "other")["clip"]
    assert sorted(one) == list(range(160))
    for row in one:
        np.testing.assert_array_equal(one[row], two[row])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "0"], "--frames: found '0', expected a whole number from 1"),
        (["--dtype", "bf16"], "--dtype bf16: NumPy has no such type"),
        (["--shard-size", "0"], "--shard-size: found '0', expected a whole number from 1"),
        (["--batch-size", "-1"], "--batch-size: found '-1', expected a whole number from 1"),
        (["--features", "patch"], "invalid choice: 'patch'"),
        (["--checkpoint", "gone.pt"], "gone.pt"),
        (["--checkpoint", ""], "--checkpoint: not given"),
        (["--videos", "gone.txt"], "video list gone.txt: no such file"),
        (["--fames", "4"], "unknown flag --fames: did you mean --frames"),
    ],
)
def test_mistakes_are_one_line_and_status_2(data, tmp_path, capsys, flags, message):
    assert run(data, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("tools/extract_features.py: error: ") and message in lines[0]


def test_another_checkpoint_does_not_go_on(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", videos="good.txt") == 0
    torch.manual_seed(4)
    save_weights(tiny_model("TIMEMAMBA_VITB16"), tmp_path / "other.pt", PREPROCESS)
    flags = ["--checkpoint", str(tmp_path / "other.pt")]
    assert run(data, tmp_path / "out", *flags, videos="good.txt") == 2
    assert "was begun with weights" in capsys.readouterr().err
