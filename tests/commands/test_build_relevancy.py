"""tools/build_relevancy.py on small CSVs, and on the real ones where they are."""

import csv
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from avion.commands import build_relevancy as tool

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "ek100"

# (narration id, verb class, noun classes)
CLIPS = [("P01_1_0", 0, [1]), ("P01_1_1", 0, [1, 2]), ("P02_5_0", 3, [2]), ("P02_5_1", 3, [4])]
SENTENCES = ["P01_1_1", "P02_5_0"]
EXPECTED = np.array([[0.75, 0.0], [1.0, 0.25], [0.25, 1.0], [0.0, 0.5]])


@pytest.fixture
def csvs(tmp_path):
    columns = (
        "narration_id participant_id video_id start_timestamp stop_timestamp narration verb_class noun_class "
        "all_noun_classes"
    ).split()
    with open(tmp_path / "clips.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for name, verb, nouns in CLIPS:
            writer.writerow([name, "P01", "P01_1", "00:00:01.00", "00:00:02.00", "text", verb, nouns[0], nouns])
    (tmp_path / "sentences.csv").write_text("narration_id,narration\n" + "".join(f"{s},text\n" for s in SENTENCES))
    return [str(tmp_path / "clips.csv"), str(tmp_path / "sentences.csv")]


def run(capsys, *argv):
    status = tool.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_written_and_checked(capsys, csvs, tmp_path):
    path = tmp_path / "relevancy.pkl"
    status, lines, _ = run(capsys, *csvs, "--output", path)
    assert (status, lines) == (0, [f"{path}: 4 clips x 2 sentences, float64, 0 MB"])
    loaded = pickle.loads(path.read_bytes())
    assert loaded.dtype == np.float64
    np.testing.assert_allclose(loaded, EXPECTED, rtol=1e-15)
    status, lines, _ = run(capsys, *csvs, "--check", path)
    assert (status, lines) == (0, [f"{path}: 0 of 8 cells differ by more than 0.0001 (4 clips x 2 sentences)"])


def test_differences_are_listed_with_ids_and_both_values(capsys, csvs, tmp_path):
    wrong = EXPECTED.astype(np.float32)
    wrong[1, 1], wrong[3, 0] = 0.5, 0.125
    (tmp_path / "wrong.pkl").write_bytes(pickle.dumps(wrong))
    status, lines, _ = run(capsys, *csvs, "--check", tmp_path / "wrong.pkl")
    assert status == 1
    assert lines[:2] == [
        "clip 1 (P01_1_1), sentence 1 (P02_5_0): 0.5 in the file, 0.25 computed",
        "clip 3 (P02_5_1), sentence 0 (P01_1_1): 0.125 in the file, 0 computed",
    ]
    assert lines[2].startswith(f"{tmp_path}/wrong.pkl: 2 of 8 cells differ")
    (tmp_path / "wrong.pkl").write_bytes(pickle.dumps(np.where(EXPECTED == 0.5, 0.5, 1 - EXPECTED)))
    status, lines, _ = run(capsys, *csvs, "--check", tmp_path / "wrong.pkl")
    assert status == 1 and lines[-1].startswith(f"{tmp_path}/wrong.pkl: 7 of 8") and len(lines) == 8


def test_an_existing_file_is_overwritten_when_asked_to(capsys, csvs, tmp_path):
    path = tmp_path / "relevancy.pkl"
    path.write_bytes(b"old")
    status, _, error = run(capsys, *csvs, "--output", path)
    assert status == 2 and "exists already" in error and path.read_bytes() == b"old"
    assert run(capsys, *csvs, "--output", path, "--force")[0] == 0
    assert pickle.loads(path.read_bytes()).shape == (4, 2)


@pytest.mark.parametrize(
    "case", ["no clips", "no sentences", "unknown id", "no column", "no pickle", "shape", "no matrix", "no folder"]
)
def test_mistakes_are_one_line_and_status_2(capsys, csvs, tmp_path, case):
    clips, sentences = csvs
    check = ["--check", tmp_path / "relevancy.pkl"]
    (tmp_path / "relevancy.pkl").write_bytes(pickle.dumps(EXPECTED))
    if case == "no clips":
        clips = tmp_path / "gone.csv"
    elif case == "no sentences":
        sentences = tmp_path / "gone.csv"
    elif case == "unknown id":
        Path(sentences).write_text("narration_id,narration\nP09_9_9,text\n")
    elif case == "no column":
        Path(clips).write_text(Path(clips).read_text().replace("verb_class", "verb", 1))
    elif case == "no pickle":
        (tmp_path / "relevancy.pkl").unlink()
    elif case == "shape":
        (tmp_path / "relevancy.pkl").write_bytes(pickle.dumps(EXPECTED[:3]))
    elif case == "no matrix":
        (tmp_path / "relevancy.pkl").write_bytes(pickle.dumps({"a": 1}))
    else:
        check = ["--output", tmp_path / "gone" / "relevancy.pkl"]
    status, lines, error = run(capsys, clips, sentences, *check)
    assert status == 2 and lines == []
    assert error.startswith("tools/build_relevancy.py: error: ") and error.count("\n") == 1
    named = {"no clips": "gone.csv", "no sentences": "gone.csv", "unknown id": "P09_9_9", "no column": "'verb_class'"}
    assert named.get(case, "relevancy.pkl") in error


@pytest.mark.skipif(not REAL.is_dir(), reason="the real annotations are not beside the project")
def test_the_real_test_split(capsys, tmp_path, rng):
    files = [REAL / "EPIC_100_validation.csv", REAL / "EPIC_100_retrieval_test_sentence.csv"]
    path = tmp_path / "relevancy.pkl"
    tracemalloc.start()
    try:
        assert run(capsys, *files, "--output", path)[0] == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500e6
    matrix = pickle.loads(path.read_bytes())
    assert matrix.shape == (9668, 3842) and matrix.min() == 0.0 and matrix.max() == 1.0
    assert (matrix == 1.0).any(axis=1).all() and (matrix == 1.0).any(axis=0).all()

    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    by_id = {row["narration_id"]: row for row in rows}
    sentences = [by_id[row["narration_id"]] for row in csv.DictReader(files[1].read_text().splitlines())]
    for i, j in zip(rng.integers(len(rows), size=3000), rng.integers(len(sentences), size=3000), strict=True):
        a, b = rows[i], sentences[j]
        nouns, others = ({*row["all_noun_classes"].strip("[]").split(", ")} for row in (a, b))
        expected = ((a["verb_class"] == b["verb_class"]) + len(nouns & others) / len(nouns | others)) / 2
        assert matrix[i, j] == pytest.approx(expected, rel=1e-12)
