"""A file per video: formats, names, resuming, parts of a job, and the reader `avion.features.read`."""

import json
import zipfile

import numpy as np
import pytest
import torch

from avion.engine.feature_folder import Part
from avion.engine.feature_shards import Shards
from avion.engine.feature_videos import VideoFiles, file_stem
from avion.errors import UserError
from avion.features import read

VIDEOS = ["a.mp4", "deep/b.mp4", "P01/P01_01"]


def settings(format="npz", **more):
    return {"format": format, "features": ["clip"], "per_video": True, **more}


def opened(folder, format="npz", part=None, videos=VIDEOS, digests=None, retry=False, **more):
    return VideoFiles(folder, videos, digests or [""] * len(videos), settings(format, **more), part or Part(), retry)


def rows(count, seed=0):
    """Features (count, 3), spans (count, 2)."""
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return values, np.stack([np.arange(count) * 0.5, np.arange(count) * 0.5 + 1], axis=1)


@pytest.mark.parametrize(
    ("video", "stem"),
    [
        ("a.mp4", "a"), ("deep/b.MKV", "deep/b"), ("P01/P01_01", "P01_01"), ("x.y", "x.y"),
        ("/data/v/a.mp4", "data/v/a"), ("../up/a.mp4", "up/a"), ("./a.mp4", "a"), ("P01/other", "P01/other"),
    ],
)  # fmt: skip
def test_names_of_files(video, stem):
    assert file_stem(video) == stem


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("npz", torch.float32), ("npz", torch.float16), ("npy", torch.float16), ("pt", torch.bfloat16),
     ("safetensors", torch.bfloat16), ("safetensors", torch.float32)],
)  # fmt: skip
def test_what_is_written_is_read(tmp_path, format, dtype):
    values, spans = rows(4)
    stored = values.to(dtype)
    with opened(tmp_path, format) as files:
        files.write(0, {"clip": stored}, spans, ["", "", "chunk 3 is missing", ""])
        files.write(2, {"clip": stored[:2]}, spans[:2], ["", ""], ids=["n1", "n2"])
        files.fail(1, "deep/b.mp4: is no video")
        assert files.errors == {
            "a.mp4": "1 of 4 rows, such as: chunk 3 is missing",
            "deep/b.mp4": "deep/b.mp4: is no video",
        }
    found = read(tmp_path)
    assert list(found) == ["a.mp4", "P01/P01_01"] and len(found) == 2
    assert found.errors == {"deep/b.mp4": "deep/b.mp4: is no video"}
    video = found["a.mp4"]
    assert video.valid.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(video.clip[video.valid], stored.float().numpy()[video.valid])
    assert np.isnan(video.clip[2]).all() and not np.isnan(video.clip[video.valid]).any()
    np.testing.assert_array_equal(np.stack([video.start, video.end], axis=1), spans)
    assert video.ids is None
    assert found["P01/P01_01"].ids == (None if format == "safetensors" else ("n1", "n2"))
    with pytest.raises(AttributeError, match="no features 'frame' here"):
        video.frame  # noqa: B018


def test_bare_arrays_are_what_localisation_code_loads(tmp_path):
    """ActionFormer: numpy.load of a file (T, C); Ego4D's baselines: torch.load of a tensor (T, C)."""
    values, spans = rows(4)
    for format in ("npy", "pt"):
        with opened(tmp_path / format, format) as files:
            files.write(2, {"clip": values}, spans, [""] * 4)
    np.testing.assert_array_equal(np.load(tmp_path / "npy/P01_01.npy", allow_pickle=False), values.numpy())
    assert torch.equal(torch.load(tmp_path / "pt/P01_01.pt", weights_only=True), values)
    assert sorted(p.name for p in (tmp_path / "npy").glob("*.npy")) == ["P01_01.npy"]
    with np.load(tmp_path / "npy/times/P01_01.npz") as times:
        assert times["start"].tolist() == [0, 0.5, 1, 1.5] and times["valid"].all()


def test_two_videos_with_one_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"videos a.mp4 and a.mkv: would both be written to a.npz"):
        opened(tmp_path, videos=["a.mp4", "a.mkv"])


@pytest.mark.parametrize("format", ["npz", "npy"])
def test_going_on(tmp_path, format):
    values, spans = rows(2)
    with opened(tmp_path, format) as files:
        files.write(0, {"clip": values}, spans, ["", ""])
        files.fail(1, "broken")
    with opened(tmp_path, format) as files:
        assert files.todo() == [2] and files.errors == {"deep/b.mp4": "broken"}
    with opened(tmp_path, format, retry=True) as files:
        assert files.todo() == [1, 2] and files.errors == {}
        files.write(1, {"clip": values}, spans, ["", ""])
    assert read(tmp_path).errors == {}
    (tmp_path / f"a.{format}").unlink()
    (tmp_path / "b.npz.0-0.partial").write_bytes(b"half")
    with opened(tmp_path, format) as files:
        assert files.todo() == [0, 2]
    assert not list(tmp_path.glob("*.partial"))
    with opened(tmp_path, format, videos=[*VIDEOS, "new.mp4"]) as files:  # the list has grown
        assert files.todo() == [0, 2, 3]
    with opened(tmp_path, format, digests=["", "other clips", ""]) as files:
        assert files.todo() == [0, 1, 2]
    with pytest.raises(UserError, match="was begun with window None, this run has 2"):
        opened(tmp_path, format, window=2)


def test_a_list_that_is_another_does_not_drop_what_the_first_wrote(tmp_path):
    values, spans = rows(2)
    with opened(tmp_path) as files:
        files.write(0, {"clip": values}, spans, ["", ""])
    with opened(tmp_path, videos=["other.mp4"]) as files:
        files.write(0, {"clip": values}, spans, ["", ""])
    assert sorted(read(tmp_path)) == ["a.mp4", "other.mp4"]
    with opened(tmp_path) as files:
        assert files.todo() == [1, 2]


def test_parts(tmp_path):
    values, spans = rows(2)
    with opened(tmp_path, part=Part(0, 2)) as one, opened(tmp_path, part=Part(1, 2)) as two:
        assert (one.todo(), two.todo()) == ([0, 2], [1])
        two.write(1, {"clip": values}, spans, ["", "x"])
        one.write(0, {"clip": values}, spans, ["", ""])
        assert one.errors == {}
    with opened(tmp_path) as files:
        assert files.todo() == [2] and list(files.errors) == ["deep/b.mp4"]


def test_shards_are_read_by_video(tmp_path):
    """A folder of shards holds the rows of a list; the reader gives those of a video together."""
    rows = [("a", 0.0, 2.0, "n0"), ("b", 1.0, None, "n1"), ("a", 3.0, 4.0, "n2"), ("a", 5.0, 6.0, "n3")]
    shared = {"shard_size": 3, "format": "npz", "features": ["clip"]}
    with Shards(tmp_path, 4, shared) as shards:
        for shard in (1, 0):  # processes finish in any order
            keys = ("row", "video", "start", "end", "id")
            entries = [dict(zip(keys, (r, *rows[r]), strict=True)) for r in shards.rows(shard)]
            for entry in entries:
                if entry["row"] == 2:
                    entry["error"] = "a chunk is missing"
            values = torch.tensor([[float(r)] * 2 for r in shards.rows(shard)])
            shards.write(shard, {"clip": values}, entries)
    found = read(tmp_path)
    assert list(found) == ["a", "b"] and set(found["a"].features) == {"clip"}
    video = found["a"]
    assert video.start.tolist() == [0, 3, 5] and video.end.tolist() == [2, 4, 6] and video.ids == ("n0", "n2", "n3")
    assert video.valid.tolist() == [True, False, True] and video.clip[[0, 2], 0].tolist() == [0, 3]
    assert np.isnan(video.clip[1]).all() and np.isnan(found["b"].end).all()
    entry = json.loads((tmp_path / "index.jsonl").read_text().splitlines()[-1])
    for change, message in (({"position": 7}, "names position 7 of 3"), ({"start": []}, "a time that is no number")):
        with open(tmp_path / "index.jsonl", "a") as file:
            file.write(json.dumps({**entry, **change}) + "\n")
        with pytest.raises(UserError, match=message):
            read(tmp_path)["a"]


# ---- the reader does not trust what it reads ------------------------------------------------------


def damaged(tmp_path, change=None, settings_text=None):
    values, spans = rows(3)
    with opened(tmp_path) as files:
        files.write(0, {"clip": values}, spans, ["", "", ""])
    if change is not None:
        entry = json.loads((tmp_path / "index.jsonl").read_text())
        (tmp_path / "index.jsonl").write_text(json.dumps({**entry, **change}) + "\n")
    if settings_text is not None:
        (tmp_path / "settings.json").write_text(settings_text)
    return tmp_path


@pytest.mark.parametrize("name", ["../secret.npz", "/etc/passwd", "", 7, "a/../../x.npz", "a\0b"])
def test_an_index_that_leads_out_of_the_folder(tmp_path, name):
    folder = damaged(tmp_path, {"file": name})
    with pytest.raises(UserError, match=r"index.jsonl: names the file"):
        read(folder)["a.mp4"]


def test_arrays_that_are_no_features(tmp_path):
    folder = damaged(tmp_path)
    path = folder / "a.npz"
    np.savez_compressed(path, clip=np.zeros((1000, 1000)))
    with pytest.raises(UserError, match="a.npz: clip.npy is compressed"):
        read(folder)["a.mp4"]
    np.savez(path, clip=np.zeros((3, 2)), start=np.zeros(2), end=np.zeros(3), valid=np.ones(3, dtype=bool))
    with pytest.raises(UserError, match="does not hold features with their start, end and valid"):
        read(folder)["a.mp4"]
    np.savez(path, clip=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="is not a file of features"):
        read(folder)["a.mp4"]
    path.write_bytes(b"PK no zip")
    with pytest.raises(UserError, match="is not a file of features"):
        read(folder)["a.mp4"]
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read(folder)["a.mp4"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "text")
    with pytest.raises(UserError):
        read(folder)["a.mp4"]


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_is_not_run(tmp_path, capsys):
    values, spans = rows(3)
    with opened(tmp_path, "pt") as files:
        files.write(0, {"clip": values}, spans, [""] * 3)
    torch.save(Evil(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: is not a file of features"):
        read(tmp_path)["a.mp4"]
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_settings_that_are_none(tmp_path, text):
    with pytest.raises(UserError, match="settings.json: is not the settings"):
        read(damaged(tmp_path, settings_text=text))


def test_a_folder_without_features(tmp_path):
    with pytest.raises(UserError, match="settings.json: no such file; give the --output-dir"):
        read(tmp_path)
