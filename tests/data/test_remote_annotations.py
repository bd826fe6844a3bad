"""Annotations of every kind under URLs: what comes out is what the local file gives."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

pytest.importorskip("fsspec")

from avion.data.captions import read_narrations
from avion.data.charades_ego import read_charades_classes, read_charades_ego
from avion.data.ego4d import read_ego4d
from avion.data.egomcq import read_egomcq
from avion.data.egoschema import LongVideos, read_questions
from avion.data.egtea import read_egtea_classes, read_egtea_split
from avion.data.ek100 import is_ek100_file, load_relevancy, read_ek100_retrieval, read_sentences, sentence_path
from avion.data.ek100_actions import read_ek100_actions, read_participants, read_tail_classes
from avion.data.video_list import read_video_list
from avion.engine.tasks.evaluations import evaluation_of
from avion.engine.tasks.finetune_retrieval import relevancy_file
from avion.engine.tasks.sources import parse_weighted
from avion.engine.text_features import read_sentences as read_texts
from avion.engine.yaml_files import read_yaml_mapping
from avion.errors import UserError
from avion.json_lines import read_json_lines


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AVION_CACHE", str(tmp_path / "cache"))


def url(path):
    return f"file://{path}"


def plain(value):
    """A value that compares: dataclasses and tables as what is in them."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes() if value.dtype != object else value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return plain(vars(value)) if hasattr(value, "__dict__") and type(value).__module__.startswith("avion") else value


READERS = {
    "ego4d": (lambda d: d.train_pickle, read_ego4d),
    "retrieval clips": (lambda d: d.val_csv, read_ek100_retrieval),
    "sentences beside them": (lambda d: d.val_csv, lambda path: read_sentences(sentence_path(path))),
    "relevancy": (lambda d: d.relevancy, lambda path: load_relevancy(path, *_shape(path))),
    "actions": (lambda d: d.action_validation_csv, read_ek100_actions),
    "rare classes": (lambda d: d.tail_verbs, lambda path: read_tail_classes(path, "verb")),
    "questions": (lambda d: d.egoschema_questions, read_questions),
    "egtea classes": (lambda d: d.egtea_classes, read_egtea_classes),
    "charades classes": (lambda d: d.charades_classes, read_charades_classes),
    "egomcq": (lambda d: d.egomcq, read_egomcq),
    "captions": (lambda d: d.captions, lambda path: read_narrations([path])),
    "list of videos": (lambda d: d.val_csv, read_video_list),
    "sentences of features": (lambda d: d.val_sentences, read_texts),
    "kind of file": (lambda d: d.val_csv, is_ek100_file),
}


def _shape(path):
    with open(str(path).removeprefix("file://"), "rb") as file:
        return pickle.load(file).shape


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_of_annotation(kind, demo):
    path_of, reader = READERS[kind]
    here, there = plain(reader(str(path_of(demo)))), plain(reader(url(path_of(demo))))
    assert here == there and here


def test_splits_of_class_lists(demo):
    count = len(read_egtea_classes(demo.egtea_classes))
    assert plain(read_egtea_split(url(demo.egtea_split), count)) == plain(read_egtea_split(demo.egtea_split, count))
    classes = read_charades_classes(demo.charades_classes)
    there, here = read_charades_ego(url(demo.charades_split), classes), read_charades_ego(demo.charades_split, classes)
    assert plain(there) == plain(here)


def test_lists_of_participants(demo, tmp_path):
    table = read_ek100_actions(demo.action_validation_csv)
    first = table.videos[0].partition("/")[0]
    (tmp_path / "unseen.csv").write_text(f"participant_id\n{first}\n")
    there, here = (read_participants(f(tmp_path / "unseen.csv"), table) for f in (url, str))
    np.testing.assert_array_equal(there, here)
    assert here.any()


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_captions_of_ones_own(kind, tmp_path):
    rows = [{"video": f"v{i}", "start": i, "end": i + 1.5, "caption": f"text {i}"} for i in range(5)]
    path = tmp_path / f"captions.{kind}"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("video,start,end,caption\n" + "".join(",".join(map(str, r.values())) + "\n" for r in rows))
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert plain(read_narrations([url(path)])) == plain(read_narrations([path]))
    assert [row.texts[0] for row in read_narrations([url(path)])] == [f"text {i}" for i in range(5)]
    assert plain(read_video_list(url(path))) == plain(read_video_list(path))


def test_weights_behind_urls():
    assert parse_weighted("s3://bucket/captions.csv") == ("s3://bucket/captions.csv", 1.0)
    assert parse_weighted("s3://bucket/captions.csv:0.25") == ("s3://bucket/captions.csv", 0.25)
    assert parse_weighted("http://host:8000/captions.csv") == ("http://host:8000/captions.csv", 1.0)
    assert parse_weighted("http://host:8000/captions.csv:2") == ("http://host:8000/captions.csv", 2.0)
    with pytest.raises(UserError, match="the weight behind the colon"):
        parse_weighted("s3://bucket/captions.csv:heavy")


def test_files_beside_others():
    assert sentence_path("s3://b/x/EPIC_test.csv") == "s3://b/x/EPIC_test_sentence.csv"
    assert relevancy_file("s3://b/x/rel_test.pkl", "train") == "s3://b/x/rel_train.pkl"


def test_configuration_and_logs(tmp_path):
    (tmp_path / "run.yaml").write_text("epochs: 3\n")
    assert read_yaml_mapping(url(tmp_path / "run.yaml")) == {"epochs": 3}
    (tmp_path / "log.txt").write_text('{"epoch": 1}\n')
    assert read_json_lines(url(tmp_path / "log.txt")).objects == [{"epoch": 1}]


def test_long_videos(demo):
    questions = read_questions(demo.egoschema_questions)
    here, there = (
        LongVideos(questions, root(demo.egoschema_videos), size=32, sampling="uniform") for root in (str, url)
    )
    a, b = here[0, [4]], there[0, [4]]
    assert a["error"] == b["error"] == "" and (a["frames"] == b["frames"]).all() and len(a["frames"]) == 4


@pytest.mark.parametrize(
    "read, message",
    [
        (lambda p: read_ego4d(p + ".pkl"), "narrations memory://gone/x.pkl: no such file"),
        (lambda p: read_narrations([p + ".csv"]), "annotations memory://gone/x.csv: no such file"),
        (lambda p: read_narrations([p + ".jsonl"]), "captions memory://gone/x.jsonl: no such file"),
        (lambda p: read_questions(p + ".json"), "memory://gone/x.json: no such file"),
        (lambda p: read_egtea_classes(p + ".txt"), "classes memory://gone/x.txt: no such file"),
        (lambda p: read_video_list(p + ".txt"), "video list memory://gone/x.txt: no such file"),
        (lambda p: read_yaml_mapping(p + ".yaml"), "--config memory://gone/x.yaml: cannot be read"),
        (
            lambda p: evaluation_of(p + ".jsonl", "r", "--root", "", None),
            "--val-metadata memory://gone/x.jsonl: no such",
        ),
    ],
)
def test_files_that_are_not_there(read, message):
    with pytest.raises(UserError, match=message) as caught:
        read("memory://gone/x")
    assert "\n" not in str(caught.value)
