"""Scripts written for AVION run on this package: its calls, in its order, with its arguments (avion_script.py)."""

import csv
import math
import os

import pytest
import torch

from avion.data.demo import ensure_demo_dataset
from avion.models import load_checkpoint, registry
from tests import avion_script
from tests.data.demo_case import SMALL
from tests.processes import run_processes


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Videos and annotations under the names that Ego4D and EPIC-KITCHENS have, and weights to start from."""
    root = tmp_path_factory.mktemp("avion_scripts")
    paths = ensure_demo_dataset(root / "demo", seed=3, size=SMALL, workers=1)
    avion_script.save_image_clip(root / "clip.pt")
    return paths, str(root / "clip.pt")


def pretraining(demo, output_dir, **changed):
    paths, clip = demo
    return avion_script.flags(
        root=str(paths.train_videos),
        root_val=str(paths.val_videos),
        train_metadata=str(paths.train_pickle),
        val_metadata=str(paths.val_csv),
        relevancy_path=str(paths.relevancy),
        pretrain_path=clip,
        output_dir=str(output_dir),
        **changed,
    )


def _run(rank, size, job, args, alone):
    if alone:  # as `python script.py` starts it, without torchrun
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
    avion_script.register_tiny_model()
    result = getattr(avion_script, job)(*args)
    return result, args[0].distributed, args[0].world_size, args[0].gpu, args[0].dist_backend


def run(job, args, folder, size=1, alone=False):
    return run_processes(_run, size, folder, job, args, alone)


def assert_finished(result, epochs):
    assert len(result["losses"]) == epochs and all(math.isfinite(loss) for loss in result["losses"])
    assert all(0 < figures["avg_map"] <= 1 for figures in result["validation"])


def test_pretraining_and_retrieval_in_one_process(demo, tmp_path, monkeypatch):
    """Started as `python script.py`; a second start goes on where the first ended. Retrieval as by torchrun."""
    args = pretraining(demo, tmp_path / "out", epochs=1, train_metadata_aux=[str(demo[0].long_train_pickle)])
    ((first, distributed, size, gpu, backend),) = run("pretrain", [args], tmp_path / "a", alone=True)
    assert_finished(first, 1)
    assert (distributed, size, gpu, backend) == (False, 1, None, "gloo")
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint.pt", "checkpoint_best.pt"]

    args = pretraining(demo, tmp_path / "out", epochs=2, fused_decode_crop=True)
    ((second, *_),) = run("pretrain", [args], tmp_path / "b", alone=True)
    assert_finished(second, 1)
    # The same weights; bytes are rounded in the fused crop.
    before, after = first["validation"][1], second["validation"][0]
    assert after["loss"] == pytest.approx(before["loss"], rel=0.02)

    paths = demo[0]
    mir = avion_script.flags(
        dataset="ek100_mir",
        root=str(paths.ek100_videos),
        train_metadata=str(paths.train_csv),
        val_metadata=str(paths.val_csv),
        relevancy_path=str(paths.relevancy),
        clip_length=4,
        workers=1,
        epochs=1,
        pretrain_model=str(tmp_path / "out/checkpoint.pt"),
        output_dir=str(tmp_path / "mir"),
    )
    ((result, distributed, size, *_),) = run("finetune_mir", [mir], tmp_path / "c")
    assert_finished(result, 1)
    assert (distributed, size) == (True, 1)
    assert 0 < result["losses"][0] < 0.5

    # What the script saved is a checkpoint like any other.
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    monkeypatch.setattr(avion_script.model_clip, "CLIP_TINY", None, raising=False)
    avion_script.register_tiny_model()
    model = avion_script.model_clip.CLIP_TINY(num_frames=4, project_embed_dim=16, pretrain_zoo="none")
    report = load_checkpoint(model, tmp_path / "mir/checkpoint.pt")
    assert not report.resized and not report.missing
    assert all(torch.equal(value, result["weights"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("local_loss", [False, True])
def test_two_processes_train_one_model(demo, tmp_path, local_loss):
    """Both have the same weights in the end; what they measured before training is what one process measures."""
    two = pretraining(demo, tmp_path / "two", epochs=1, batch_size=2, local_loss=local_loss)
    parts = run("pretrain", [two], tmp_path / "a", size=2)
    assert all((distributed, size) == (True, 2) for _, distributed, size, *_ in parts)
    first, second = (part[0] for part in parts)
    assert_finished(first, 1)
    assert first["losses"] == second["losses"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    alone = pretraining(demo, tmp_path / "one", epochs=0)
    ((one, *_),) = run("pretrain", [alone], tmp_path / "b")
    assert one["validation"][0]["avg_map"] == pytest.approx(first["validation"][0]["avg_map"], abs=1e-6)


def test_retrieval_in_two_processes(demo, tmp_path):
    paths = demo[0]
    ((_, *_),) = run("pretrain", [pretraining(demo, tmp_path / "out", epochs=1)], tmp_path / "a")
    mir = avion_script.flags(
        dataset="ek100_mir",
        root=str(paths.ek100_videos),
        train_metadata=str(paths.train_csv),
        val_metadata=str(paths.val_csv),
        relevancy_path=str(paths.relevancy),
        batch_size=2,
        epochs=1,
        pretrain_model=str(tmp_path / "out/checkpoint.pt"),
        output_dir=str(tmp_path / "mir"),
    )
    (first, *_), (second, *_) = run("finetune_mir", [mir], tmp_path / "b", size=2)
    assert_finished(first, 1)
    assert first["losses"] == second["losses"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_action_recognition(demo, tmp_path):
    """Labels are the places of "verb:noun" in the list of actions; three crops give three lists of logits."""
    paths, clip = demo
    args = avion_script.flags(
        dataset="ek100_cls",
        root=str(paths.ek100_videos),
        train_metadata=str(paths.action_train_csv),
        val_metadata=str(paths.action_validation_csv),
        num_clips=1,
        num_crops=3,
        pretrain_path=clip,
    )
    (((clips, labels, logits, views), *_),) = run("downstream", [args, str(paths.annotations)], tmp_path)
    with open(paths.action_train_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"{row['verb_class']}:{row['noun_class']}" for row in rows]
    with open(paths.action_validation_csv, newline="") as file:
        actions = sorted({*names, *(f"{row['verb_class']}:{row['noun_class']}" for row in csv.DictReader(file))})
    assert clips == len(rows) and labels.tolist() == [actions.index(name) for name in names[:2]]
    assert logits.shape == (2, len(actions)) and [view.shape for view in views] == [logits.shape] * 3
    assert not torch.equal(views[0], views[2])
