"""tools/search_videos.py index and search, on small videos and a small model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from avion.commands import search_videos as tool
from avion.data.tokenizer import tokenize
from avion.engine.features import extract, load_clip
from avion.models import model_from_checkpoint
from avion.models.model_clip import VideoClassifier
from avion.search.index import open_index
from avion.weights import save_weights
from tests.models.tiny import tiny_model
from tests.search.case import PREPROCESS, write_data
from tests.videos import barcode_frame, write_video

QUICK = "--device cpu --workers 0".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_data(tmp_path_factory.mktemp("data"))
    assert index(root, root / "index") == 0
    return root


def index(data, out, *flags, folder="videos"):
    words = ["index", data / folder, "--checkpoint", data / "checkpoint.pt", "--index", out, *QUICK, *flags]
    return tool.main(list(map(str, words)))


def search(data, *words, index="index"):
    return tool.main([str(w) for w in ["search", *words, "--index", data / index, "--device", "cpu"]])


def answer(data, capsys, *words, index="index"):
    capsys.readouterr()
    assert search(data, *words, "--json", index=index) == 0
    return json.loads(capsys.readouterr().out)


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_the_rows_are_unit_features_of_windows(data):
    found = open_index(data / "index")
    assert found.videos == ["a", "deep/b"] and found.times[:, 0].tolist() == [*range(7), *range(4)]
    model = model_from_checkpoint(data / "checkpoint.pt")
    for row, (video, start) in enumerate([("a", s) for s in range(7)] + [("deep/b", s) for s in range(4)]):
        clip = load_clip(data / f"videos/{video}.mp4", 4, model, start=start, end=start + 2)
        wanted = unit(extract(model, clip, ["clip"])["clip"][0].numpy())
        np.testing.assert_allclose(found.windows[row], wanted, atol=0.02)  # pixels are rounded in another order
    assert np.linalg.norm(found.windows.astype(np.float64), axis=1) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("template", [[], ["#C C {}"], ["{}", "#C C {}"]])
def test_a_sentence(data, capsys, template):
    flags = ["--template", *template] if template else []
    found = answer(data, capsys, "folds a cloth", "--top", "3", "--longest", "2", *flags)
    model = model_from_checkpoint(data / "checkpoint.pt").eval()
    with torch.no_grad():
        texts = [t.replace("{}", "folds a cloth") for t in template or ["{}"]]
        query = unit(unit(model.encode_text(tokenize(texts, 16, 512)).numpy()).mean(axis=0))
    rows = open_index(data / "index")
    scores = rows.windows.astype(np.float64) @ query
    best = int(scores.argmax())
    first = found["moments"][0]
    assert first["score"] == pytest.approx(scores[best], abs=1e-4) and first["rank"] == 1
    assert (first["video"], first["start"]) == (rows.videos[rows.video_of(best)], rows.times[best, 0])
    assert found["query"] == "folds a cloth" and found["windows"] == 11 and len(found["moments"]) == 3
    assert search(data, "folds a cloth", "--top", "2", *flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["score", "time", "video"] and len(printed) == 4
    assert printed[-1].startswith("11 windows of 2 videos in ")
    assert f"{first['score']:.3f}  0:00:" in printed[1]


def test_a_clip_finds_itself_and_a_picture_its_frame(data, capsys, tmp_path):
    flags = ["--clip-start", "2", "--clip-end", "4", "--longest", "2"]
    found = answer(data, capsys, "--clip", data / "videos/deep/b.mp4", *flags)["moments"][0]
    assert (found["video"], found["start"], found["end"]) == ("deep/b", 2, 4) and found["score"] > 0.99
    write_video(tmp_path / "still/one.mp4", 30, fps=10, numbers=1)
    write_video(tmp_path / "still/two.mp4", 30, first=77, fps=10, numbers=1)
    write_video(tmp_path / "still/six.mp4", 30, first=600, fps=10)
    assert index(data, tmp_path / "index", folder=tmp_path / "still") == 0
    Image.fromarray(barcode_frame(0)).save(tmp_path / "frame.png")
    found = answer(data, capsys, "--image", tmp_path / "frame.png", index=tmp_path / "index")["moments"][0]
    assert found["video"] in ("one", "two") and found["score"] > 0.98  # both show barcode 0 all the time


def test_filters(data, capsys):
    for pattern in ("deep", "deep/*", "*/b"):
        found = answer(data, capsys, "a cloth", "--videos", pattern)["moments"]
        assert {m["video"] for m in found} == {"deep/b"}
    assert search(data, "a cloth", "--videos", "gone") == 2
    assert "--videos gone: no video of the index matches; there are a, deep/b" in capsys.readouterr().err


def test_chunks_and_videos_that_come_later(data, capsys, tmp_path):
    (tmp_path / "chunks").mkdir()
    for name in ("a.mp4", "deep"):
        (tmp_path / f"chunks/{name}").symlink_to(data / f"chunks/{name}")
        assert index(data, tmp_path / "index", "--video-chunk-length", "3", folder=tmp_path / "chunks") == 0
    assert "index: 11 windows of 2 videos" in capsys.readouterr().out
    chunked, whole = open_index(tmp_path / "index"), open_index(data / "index")
    assert chunked.videos == whole.videos and len(list((tmp_path / "index").glob("*.npy"))) == 2
    near = chunked.windows.astype(np.float64) @ whole.windows.astype(np.float64).T
    assert (near.argmax(axis=1) == np.arange(11)).all()  # encoded twice, so not to the bit
    store, name = chunked.finder().find("deep/b")
    assert store.layout.kind == "avion" and store.length_of(name) == 5


def test_jobs_of_an_array(data, capsys, tmp_path):
    assert index(data, tmp_path / "index", "--shard", "0/2") == 0
    assert "index: 1 videos are left to other jobs; the last one writes the index" in capsys.readouterr().out
    assert index(data, tmp_path / "index", "--shard", "1/2") == 0
    assert "index: 11 windows of 2 videos" in capsys.readouterr().out


def test_unreadable_videos_are_told_and_left_out(data, capsys, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.mp4").hardlink_to(data / "videos/a.mp4")
    (tmp_path / "v/bad.mp4").write_bytes(b"no video")
    assert index(data, tmp_path / "index", folder=tmp_path / "v") == 1
    printed = capsys.readouterr().out
    assert "unreadable  bad: " in printed and "7 windows of 1 videos" in printed
    (tmp_path / "v/a.mp4").unlink()
    assert index(data, tmp_path / "none", folder=tmp_path / "v") == 2
    assert "no window of any video can be read" in capsys.readouterr().err


def test_other_weights_are_refused(data, capsys, tmp_path):
    torch.manual_seed(12)
    save_weights(tiny_model("TIMEMAMBA_VITB16"), tmp_path / "other.pt", PREPROCESS)
    assert search(data, "a cloth", "--checkpoint", tmp_path / "other.pt") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was made with other weights" in error and str(data / "checkpoint.pt") in error
    assert index(data, data / "index", "--checkpoint", tmp_path / "other.pt") == 2
    assert "was begun with weights" in capsys.readouterr().err
    towers = tiny_model("TIMEMAMBA_VITB16")
    save_weights(VideoClassifier(towers.visual, 0.5, 6, config=towers.config), tmp_path / "c.pt", PREPROCESS)
    assert search(data, "a cloth", "--checkpoint", tmp_path / "c.pt") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command; give one of index, search, serve"),
        (["find"], "unknown command 'find'; give one of"),
        (["index", "--checkpoint", "c.pt"], "FOLDER: not given"),
        (["index", "videos"], "--checkpoint: not given"),
        (["index", "gone", "--checkpoint", "c.pt"], "video root gone: no such folder"),
        (["search"], "no query: give one of a sentence, --image and --clip"),
        (["search", "text", "--image", "x.png"], "--query and --image: give one of"),
        (["search", "text", "--clip-start", "2"], "--clip-start and --clip-end: are of --clip"),
        (["search", "text", "--index", "gone"], "gone/search.json: no such file"),
        (["search", "text", "--top", "0"], "--top: found '0'"),
        (["serve", "--port", "70000"], "--port: found '70000'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool.main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("tools/search_videos.py") and message in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["   "], "query: is empty"),
        (["--image", "gone.png"], "image gone.png: no such file"),
        (["--image", "{data}/checkpoint.pt"], "checkpoint.pt: cannot be read"),
        (["--clip", "gone.mp4"], "--clip"),
        (["text", "--template", "no place"], "{}"),
    ],
)
def test_queries_that_cannot_be_read(data, capsys, words, message):
    assert search(data, *(w.replace("{data}", str(data)) for w in words)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help(capsys):
    assert tool.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("index FOLDER", "search", "serve"))
