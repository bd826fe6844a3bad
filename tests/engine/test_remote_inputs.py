"""A run of two processes whose annotations, settings and checkpoints lie in an object store."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from avion.errors import UserError
from avion.weights import Checkpoint
from tests.object_store import door_to, empty_bucket, running_store
from tests.processes import agent

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store():
    with running_store() as place:
        yield place


@pytest.fixture
def door(store, tmp_path, monkeypatch):
    with door_to(store, tmp_path / "cache", monkeypatch) as door:
        yield door


@pytest.fixture
def bucket(door, tiny_data):
    fs = empty_bucket("inputs")
    for name in ("train.pkl", "val.csv", "val_sentence.csv", "relevancy.pkl"):
        fs.put_file(str(tiny_data.root / name), f"inputs/notes/{name}")
    captions = "".join(f"video{v},0,2,opens door {v}\n" for v in range(4))
    fs.pipe_file("inputs/notes/more.csv", f"video,start,end,caption\n{captions}".encode())
    return fs


def train(*words):
    """Two processes; status and output."""
    done = subprocess.run(
        [*agent(), "main_pretrain.py", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def flags(tiny_flags):
    """The flags of the tiny dataset with its annotations in the bucket; the videos stay here."""
    return [
        f"s3://inputs/notes/{Path(word).name}" if re.search(r"\.(pkl|csv)$", str(word)) else word for word in tiny_flags
    ]


def test_annotations_settings_and_checkpoints(bucket, door, tiny_flags, tmp_path):
    bucket.pipe_file("inputs/run.yaml", b"epochs: 1\ntrain-metadata-aux: ['s3://inputs/notes/more.csv:0.5']\n")
    words = flags(tiny_flags)
    at = words.index("--epochs")
    del words[at : at + 2]
    status, output = train(*words, "--config", "s3://inputs/run.yaml", "--output-dir", tmp_path / "a")
    assert status == 0, output
    for name in ("train.pkl", "more.csv", "val.csv"):  # once for both processes
        assert sum(method == "GET" and path.endswith(f"/{name}") for method, path in door.seen) == 1, name
    here = [*tiny_flags, "--epochs", "1", "--train-metadata-aux"]
    (tmp_path / "more.csv").write_bytes(bucket.cat_file("inputs/notes/more.csv"))
    status, output = train(*here, f"{tmp_path}/more.csv:0.5", "--output-dir", tmp_path / "b")
    assert status == 0, output
    rows = [json.loads((tmp_path / name / "log.txt").read_text()) for name in "ab"]
    assert rows[0]["train_loss"] == rows[1]["train_loss"] and rows[0]["test_avg_map"] == rows[1]["test_avg_map"]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for path in (tmp_path / "a").iterdir():
        assert secret.encode() not in path.read_bytes(), path

    bucket.put_file(str(tmp_path / "a/checkpoint.pt"), "inputs/weights/checkpoint.pt")
    door.seen.clear()
    more = ["--resume", "s3://inputs/weights/checkpoint.pt", "--epochs", "2", "--train-metadata-aux"]
    status, output = train(*words, *more, "s3://inputs/notes/more.csv:0.5", "--output-dir", tmp_path / "c")
    assert status == 0 and "going on from s3://inputs/weights/checkpoint.pt" in output, output
    assert sum(method == "GET" and "checkpoint.pt" in path for method, path in door.seen) == 1
    assert json.loads((tmp_path / "c/log.txt").read_text().splitlines()[-1])["epoch"] == 1


def test_a_checkpoint_is_opened_by_its_url(bucket, tmp_path):
    from avion.models import create_model

    model = create_model("TIMEMAMBA_VITT16", img_size=16, embed_dim=16, depth=1, num_heads=1, text_layers=1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    bucket.put_file(str(tmp_path / "w.pt"), "inputs/w.pt")
    opened = Checkpoint.open("s3://inputs/w.pt")
    assert opened.path == "s3://inputs/w.pt"
    for name, value in Checkpoint.open(tmp_path / "w.pt").weights.items():
        assert torch.equal(opened.weights[name], value)
    bucket.pipe_file("inputs/w.pt", b"<html>no</html>")
    with pytest.raises(UserError, match="^s3://inputs/w.pt: a web page, not a checkpoint"):
        Checkpoint.open("s3://inputs/w.pt")
    with pytest.raises(UserError, match="^s3://inputs/gone.pt: there is no such file"):
        Checkpoint.open("s3://inputs/gone.pt")


def test_what_cannot_be_read_is_one_line(bucket, tiny_flags, tmp_path):
    words = flags(tiny_flags)
    words[words.index("--train-metadata") + 1] = "s3://inputs/notes/gone.pkl"
    status, output = train(*words, "--output-dir", tmp_path / "a")
    lines = {line for line in output.splitlines() if "error" in line}  # one of each process
    assert status == 2 and lines == {"main_pretrain.py: error: narrations s3://inputs/notes/gone.pkl: no such file"}
    words[words.index("--train-metadata") + 1] = "ftp://me:hunter22@host/train.pkl"
    status, output = train(*words, "--output-dir", tmp_path / "a")
    assert status == 2 and "the address holds credentials" in output and "hunter22" not in output
