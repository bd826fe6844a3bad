"""The zips for the servers, opened by a reader that shares no code with the tool."""

import json
import pickle
import re
import zipfile

import numpy as np
import pytest

from avion.commands.make_submission import main
from avion.engine.predictions import portable_pickle

IDS = ["P01_11_0", "P01_11_1", "P02_03_7"]
SENTENCES = {"P01_11_0": "take plate", "P02_03_7": "put, then cut"}


@pytest.fixture
def files(tmp_path, rng):
    predictions = {
        "narration_id": np.array(IDS),
        "verb_output": rng.dirichlet(np.ones(97), 3).astype(np.float32),
        "noun_output": rng.dirichlet(np.ones(300), 3).astype(np.float32),
    }
    (tmp_path / "p.pkl").write_bytes(portable_pickle(predictions))
    header = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp"
    rows = [f"{name},{name[:3]},{name[:6]},00:00:01.00,00:00:02.00" for name in IDS]
    (tmp_path / "clips.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "narrated.csv").write_text("\n".join([header + ",narration", *(row + ",x" for row in rows)]) + "\n")
    sentences = [f'{name},"{text}"' for name, text in SENTENCES.items()]
    (tmp_path / "sentences.csv").write_text("\n".join(["narration_id,narration", *sentences]) + "\n")
    similarity = rng.random((3, 2)).astype(np.float32)
    np.save(tmp_path / "s.npy", similarity)
    return tmp_path, predictions, similarity


def only_file(path):
    with zipfile.ZipFile(path) as archive:
        (info,) = archive.infolist()
        assert archive.testzip() is None and info.external_attr >> 16 == 0o644
        return info.filename, archive.read(info)


def test_actions(files, capsys):
    folder, predictions, _ = files
    words = ["actions", f"{folder}/p.pkl", f"{folder}/a.zip", "--clips", f"{folder}/clips.csv", "--sls-tl", "1"]
    assert main(words) == 0
    assert "test.json for 3 clips" in capsys.readouterr().out
    name, content = only_file(folder / "a.zip")
    sent = json.loads(content)
    assert name == "test.json" and list(sent) == ["version", "challenge", "sls_pt", "sls_tl", "sls_td", "results"]
    assert (sent["version"], sent["challenge"]) == ("0.2", "action_recognition")
    assert (sent["sls_pt"], sent["sls_tl"], sent["sls_td"]) == (2, 1, 3)
    assert sorted(sent["results"]) == IDS
    for i, narration_id in enumerate(IDS):
        for kind, classes in (("verb", 97), ("noun", 300)):
            scores = sent["results"][narration_id][kind]
            found = [scores.pop(str(c)) for c in range(classes)]
            assert not scores and found == pytest.approx(predictions[f"{kind}_output"][i].tolist(), abs=1e-7)


@pytest.mark.parametrize("kind", ["npy", "pkl"])
def test_retrieval(files, kind):
    folder, _, similarity = files
    (folder / "s.pkl").write_bytes(pickle.dumps(similarity.astype(np.float64)))
    paths = [f"{folder}/{name}" for name in (f"s.{kind}", "narrated.csv", "sentences.csv", "r.zip")]
    assert main(["retrieval", *paths, "--sls-td", "5"]) == 0
    name, content = only_file(folder / "r.zip")
    assert name == "test.pkl" and b"numpy._core" not in content  # numpy 1 has no such module
    sent = pickle.loads(content)
    matrix = sent.pop("sim_mat")
    assert matrix.dtype == np.float32 and matrix.tolist() == similarity.tolist()
    assert sent == {
        "version": "0.1",
        "challenge": "multi_instance_retrieval",
        "sls_pt": 2,
        "sls_tl": 3,
        "sls_td": 5,
        "vis_ids": IDS,
        "txt_ids": list(SENTENCES),
    }


def test_the_same_predictions_give_the_same_bytes(files):
    folder, *_ = files
    for name in ("1", "2"):
        assert main(["actions", f"{folder}/p.pkl", f"{folder}/{name}.zip"]) == 0
    assert (folder / "1.zip").read_bytes() == (folder / "2.zip").read_bytes()


class Anything:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda p: {**p, "verb_output": p["verb_output"][:, 1:]}, r"verb scores: float32 of shape \(3, 96\)"),
        (lambda p: {**p, "noun_output": np.log(p["noun_output"])}, "noun scores: run from -"),
        (lambda p: {**p, "narration_id": IDS[:2]}, "verb scores: .*expected numbers for 2 ids"),
        (lambda p: {**p, "narration_id": [IDS[0], *IDS[:2]]}, "P01_11_0 comes twice"),
        (lambda p: {**p, "narration_id": "P01_11_0"}, "narration_id is no list"),
        (lambda p: {k: v for k, v in p.items() if k != "noun_output"}, "a dict with narration_id, verb_output"),
        (lambda p: [p], "a dict with"),
        (
            lambda p: {**p, "narration_id": ["P01_11_0", "P01_11_1", "P99_99_9"]},
            r"1 missing \(P02_03_7\) and 1 too many",
        ),
        (lambda p: {**p, "more": Anything()}, "not plain data"),
    ],
)
def test_bad_predictions(files, content, message, capsys):
    folder, predictions, _ = files
    (folder / "bad.pkl").write_bytes(pickle.dumps(content(predictions)))
    words = ["actions", f"{folder}/bad.pkl", f"{folder}/a.zip", "--clips", f"{folder}/clips.csv"]
    assert_refused(words, message, folder / "a.zip", capsys)


def assert_refused(words, message, output, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("tools/make_submission.py: error: ")
    assert re.search(message, captured.err), captured.err
    assert not output.exists() and not list(output.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "matrix, message",
    [
        (
            np.zeros((2, 3)),
            r"s.npy: similarities: float64 of shape \(2, 3\), expected numbers for 3 clips x 2 sentences",
        ),
        (np.full((3, 2), -0.5), "run from -0.5 to -0.5, 0 to 1 is required"),
        (np.full((3, 2), np.nan), "not numbers"),
        (np.array([[None, 1]] * 3), "not a .npy of plain numbers"),
    ],
)
def test_bad_similarities(files, matrix, message, capsys):
    folder, *_ = files
    np.save(folder / "s.npy", matrix, allow_pickle=True)
    paths = [f"{folder}/{name}" for name in ("s.npy", "narrated.csv", "sentences.csv", "r.zip")]
    assert_refused(["retrieval", *paths], message, folder / "r.zip", capsys)


def test_files_that_are_missing_or_cannot_be_written(files, capsys):
    folder, *_ = files
    p, out = f"{folder}/p.pkl", folder / "a.zip"
    assert_refused(["actions", f"{folder}/none.pkl", str(out)], "none.pkl: no such file", out, capsys)
    assert_refused(["actions", p, f"{folder}/a.json"], "ends in .zip", folder / "a.json", capsys)
    assert_refused(["actions", p, str(out), "--clips", f"{folder}/none.csv"], "none.csv", out, capsys)
    (folder / "cut.npy").write_bytes((folder / "s.npy").read_bytes()[:-3])
    paths = [f"{folder}/{name}" for name in ("cut.npy", "narrated.csv", "sentences.csv", "r.zip")]
    assert_refused(["retrieval", *paths], "cut.npy: is not a .npy", folder / "r.zip", capsys)
    with pytest.raises(SystemExit):
        main(["actions", p, str(out), "--sls-pt", "6"])
