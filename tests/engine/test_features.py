"""Features of videos in memory, the README's five lines, and the shards on disk."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avion.constants import NORM_STYLES
from avion.data.transforms import EvalTransform
from avion.data.video import open_video
from avion.engine import features
from avion.engine.feature_folder import Part
from avion.engine.feature_shards import Shards
from avion.engine.features import extract, load_clip
from avion.errors import UserError
from avion.models.model_clip import VideoClassifier
from avion.weights import save_weights
from tests.models.tiny import DISTINCT_MODELS, tiny_model
from tests.videos import write_video

ROOT = Path(__file__).parents[2]
PREPROCESS = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}


# ---- one video ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_kinds_of_features(name):
    model = tiny_model(name)
    model.train()
    video = torch.randn(3, 3, 5, 32, 32)
    found = extract(model, video)
    assert not model.training
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "clip": (3, 16),
        "frame": (3, 5, 32),
        "spatial": (3, 4, 5, 32),
    }
    with torch.no_grad():
        torch.testing.assert_close(found["clip"], model.encode_image(video), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["spatial"], model.visual.token_features(video)[1])
    torch.testing.assert_close(found["frame"], found["spatial"].double().mean(dim=1).float(), rtol=1e-5, atol=1e-5)
    assert list(extract(model, video, ["spatial"])) == ["spatial"]
    torch.testing.assert_close(extract(model, video, ["clip"])["clip"], found["clip"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["TIMEMAMBA_VITB16", "LAVILA_TSF_B16"])
def test_of_a_classifier_the_clip_is_what_its_head_reads(name):
    towers = tiny_model(name)
    model = VideoClassifier(towers.visual, 0.5, 7, config=towers.config).eval()
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        wanted = model(video)
        for kinds in (["clip"], ["clip", "frame"]):
            found = extract(model, video, kinds)["clip"]
            assert found.shape == (2, 32)
            torch.testing.assert_close(model.fc_cls(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["TIMEMAMBA_VITB16", "TIMESFORMER_FROZEN_VITB16"])
def test_clips_of_many_frames_go_a_piece_at_a_time(name, monkeypatch):
    model = tiny_model(name)
    video = torch.randn(2, 3, 12, 32, 32)
    wanted = extract(model, video, ["clip"])["clip"]
    monkeypatch.setattr(features, "default_max_tokens", lambda device: 16)  # a clip has 48
    monkeypatch.setattr(model, "encode_image", lambda video: pytest.fail("all at once"))
    torch.testing.assert_close(extract(model, video, ["clip"])["clip"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kinds", "found"), [(["clip", "patch"], "patch asked for"), ([], "nothing asked for")])
def test_unknown_kinds(kinds, found):
    with pytest.raises(UserError, match=found):
        extract(tiny_model("TIMEMAMBA_VITB16"), torch.randn(1, 3, 4, 32, 32), kinds)


def test_a_tower_without_tokens_gives_clips_only():
    model = tiny_model("TIMEMAMBA_VITB16")
    model.visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(16))
    video = torch.randn(2, 3, 4, 32, 32)
    assert extract(model, video, ["clip"])["clip"].shape == (2, 16)
    with pytest.raises(UserError, match="Sequential: has no token features"):
        extract(model, video, ["clip", "frame"])


@pytest.mark.parametrize("style", ["openai", "openai_legacy"])
def test_load_clip(tmp_path, style):
    path = write_video(tmp_path / "a.mp4", 40, fps=10)
    model = tiny_model("TIMEMAMBA_VITB16")
    clip = load_clip(path, 5, model, start=1.0, end=3.0, norm_style=style)
    assert clip.shape == (1, 3, 5, 32, 32) and clip.dtype == torch.float32
    with open_video(path) as reader:
        frames = reader.get_frames([12, 16, 20, 24, 28])
    wanted = EvalTransform(32, norm_style=style)(frames, None)
    # Rows and columns are resized one after the other, and pixels rounded each time, before they are normalised.
    assert (clip[0] - wanted).abs().max() < 1.01 / 66
    assert load_clip(path, 3, model).shape == (1, 3, 3, 32, 32)


def test_the_lines_in_the_readme_run(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Features\n.*?```python\n(.*?)```", text, re.DOTALL)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) == 5
    save_weights(tiny_model("TIMEMAMBA_VITB16"), tmp_path / "checkpoint.pt", PREPROCESS)
    write_video(tmp_path / "video.mp4", 30)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    shapes = {kind: tuple(values.shape) for kind, values in names["features"].items()}
    assert shapes == {"clip": (1, 16), "frame": (1, 16, 32), "spatial": (1, 4, 16, 32)}


# ---- shards ------------------------------------------------------------------------------------

SETTINGS = {"shard_size": 3, "format": "npz", "frames": 4}


def entries(rows, broken=()):
    return [{"row": r, "video": f"v{r}", **({"error": f"row {r} is bad"} if r in broken else {})} for r in rows]


def fill(folder, stop=3, broken=(4,), **settings):
    """Writes shards 0 … stop - 1 of seven rows; row r's clip feature is r in both channels."""
    with Shards(folder, 7, {**SETTINGS, **settings}) as shards:
        for shard in shards.todo()[:stop]:
            rows = shards.rows(shard)
            values = torch.tensor([float(r) for r in rows])
            shards.write(shard, {"clip": values[:, None].repeat(1, 2)}, entries(rows, broken))
        return shards.todo(), shards.errors


def index(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_shards_and_index(tmp_path, format):
    todo, errors = fill(tmp_path, format=format)
    assert todo == [] and errors == {4: "row 4 is bad"}
    assert sorted(p.name for p in tmp_path.glob("0*")) == [f"0000{s}.{format}" for s in range(3)]
    load = load_file if format == "safetensors" else lambda p: {k: torch.from_numpy(v) for k, v in np.load(p).items()}
    for entry in index(tmp_path):
        arrays = load(tmp_path / entry["shard"])
        assert set(arrays) == {"row", "valid", "clip"}
        place = entry["position"]
        assert arrays["row"][place] == entry["row"]
        if entry["row"] == 4:  # keeps its place
            assert entry["error"] == "row 4 is bad" and not arrays["valid"][place]
            assert arrays["clip"][place].isnan().all()
        else:
            assert "error" not in entry and arrays["valid"][place]
            assert arrays["clip"][place].tolist() == [entry["row"]] * 2
    assert [e["row"] for e in index(tmp_path)] == list(range(7))


def test_a_second_run_goes_on_after_the_finished_shards(tmp_path):
    todo, _ = fill(tmp_path, stop=2)
    assert todo == [2]
    before = (tmp_path / "00000.npz").stat().st_mtime_ns
    todo, errors = fill(tmp_path)
    assert todo == [] and errors == {4: "row 4 is bad"}
    assert (tmp_path / "00000.npz").stat().st_mtime_ns == before
    assert [e["row"] for e in index(tmp_path)] == list(range(7))


def test_unreadable_rows_are_tried_again_when_asked_for(tmp_path):
    fill(tmp_path)
    assert fill(tmp_path, broken=()) == ([], {4: "row 4 is bad"})  # not without being asked
    with Shards(tmp_path, 7, SETTINGS, retry=True) as shards:
        assert shards.todo() == [1] and shards.errors == {}
        shards.write(1, {"clip": torch.ones(3, 2)}, entries(range(3, 6)))
    assert fill(tmp_path) == ([], {})
    assert [e["row"] for e in index(tmp_path)] == [0, 1, 2, 6, 3, 4, 5]  # in the order of writing
    assert not [e for e in index(tmp_path) if "error" in e]


def test_parts_of_a_job_share_a_folder(tmp_path):
    with Shards(tmp_path, 7, SETTINGS, Part(0, 2)) as one:
        with Shards(tmp_path, 7, SETTINGS, Part(1, 2)) as two:
            assert (one.todo(), two.todo()) == ([0, 2], [1])
            for part, shard in ((two, 1), (one, 0), (one, 2)):
                rows = part.rows(shard)
                part.write(shard, {"clip": torch.zeros(len(rows), 2)}, entries(rows, (4,)))
            assert (one.errors, two.errors) == ({}, {4: "row 4 is bad"})
            with pytest.raises(UserError, match="another process does part 1/2; give each process another --shard"):
                Shards(tmp_path, 7, SETTINGS, Part(1, 2))
        with pytest.raises(UserError, match="another run writes here"):
            Shards(tmp_path, 7, SETTINGS)  # as the only process
    assert fill(tmp_path) == ([], {4: "row 4 is bad"})
    assert [e["row"] for e in index(tmp_path)] == [3, 4, 5, 0, 1, 2, 6]  # in the order of writing


@pytest.mark.parametrize("damage", ["half a line", "lines missing", "shard missing", "leftovers", "garbage"])
def test_what_a_killed_run_left_half_done_is_done_again(tmp_path, damage):
    fill(tmp_path, stop=2)
    path = tmp_path / "index.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lost = [1, 2]
    if damage == "half a line":
        path.write_text("".join(lines)[:-9])
    elif damage == "lines missing":
        path.write_text("".join(lines[:-1]))
    elif damage == "shard missing":
        (tmp_path / "00001.npz").unlink()
    elif damage == "leftovers":
        (tmp_path / "00002.npz.partial").write_bytes(b"half a shard")
        lost = [2]
    else:
        path.write_text("".join(lines) + '[]\n{}\nnull\n{"row": "a"}\n')
        lost = [2]
    with Shards(tmp_path, 7, SETTINGS) as shards:
        assert shards.todo() == lost
        assert shards.errors == ({} if 1 in lost else {4: "row 4 is bad"})
    assert not list(tmp_path.glob("*.partial"))
    assert fill(tmp_path) == ([], {4: "row 4 is bad"})
    assert [e["row"] for e in index(tmp_path)] == list(range(7))


def test_a_shard_that_cannot_be_written_is_not_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    fill(tmp_path, stop=1)
    monkeypatch.setattr("avion.engine.feature_shards.os.replace", full)
    with pytest.raises(UserError, match=r"00001\.npz: cannot be written \(No space left") as caught:
        fill(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.glob("0*")) == ["00000.npz"]
    assert [e["row"] for e in index(tmp_path)] == [0, 1, 2]


def test_other_settings_are_refused(tmp_path):
    fill(tmp_path, stop=1)
    with pytest.raises(UserError, match="was begun with frames 4, this run has 8; give") as caught:
        fill(tmp_path, frames=8)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="was begun with dtype None, this run has fp16"):
        fill(tmp_path, dtype="fp16")


@pytest.mark.parametrize("content", ["[]", "no JSON", '"text"'])
def test_damaged_settings_are_refused(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json: is not the settings of an extraction; choose another"):
        fill(tmp_path)


def test_settings_that_are_too_large_are_refused(tmp_path):
    (tmp_path / "settings.json").write_text(" " * (1 << 21) + "{}")
    with pytest.raises(UserError, match=r"settings\.json: is too large for settings; choose another --output-dir"):
        fill(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"do not touch")
    with pytest.raises(UserError, match="holds files of something else"):
        fill(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with Shards(tmp_path, 7, SETTINGS), pytest.raises(UserError, match="another run writes here"):
        Shards(tmp_path, 7, SETTINGS)
    fill(tmp_path)  # the first has let go


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--output-dir .*file/out: cannot be written"):
        Shards(tmp_path / "file" / "out", 7, SETTINGS)
