"""EPIC-KITCHENS in Video Mamba Suite's folders, {root}/{video_id}/{start // length:04d}.mp4, through every entry
point that reads it: the same weights and the same figures as from AVION's folders."""

import json
import os

import pytest
import torch

import main_finetune_classification
import main_finetune_retrieval
import main_pretrain
from tests.engine.tiny import CHUNK_S, CHUNKS

VIDEOS = ("P01_01", "P02_07")


@pytest.fixture(scope="session")
def flat_root(tiny_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("flat")
    for video in VIDEOS:
        (root / video).mkdir()
        for k in range(CHUNKS):
            os.link(tiny_data.root / f"val/{video[:3]}/{video}.MP4/{k * CHUNK_S}.MP4", root / video / f"{k:04d}.mp4")
    return root


@pytest.mark.parametrize("task", ["pretraining", "retrieval", "actions"])
def test_a_run_is_the_same(task, request, flat_root, tiny_data, tmp_path):
    main, fixture, flag = {
        "pretraining": (main_pretrain, "tiny_flags", "--root-val"),
        "retrieval": (main_finetune_retrieval, "mir_flags", "--root"),
        "actions": (main_finetune_classification, "tiny_actions", "--root"),
    }[task]
    flags = request.getfixturevalue(fixture)
    flags = [*getattr(flags, "flags", flags), "--epochs", "1", "--eval-freq", "1"]
    if task == "retrieval":
        start = request.getfixturevalue("tiny_actions").root / "pretrained.pt"
        flags += ["--pretrain-model", str(start), "--workers", "2"]
    found = []
    for name, root in (("nested", tiny_data.root / "val"), ("flat", flat_root)):
        output = tmp_path / name
        assert main.main([*flags, flag, str(root), "--output-dir", str(output)]) == 0
        evaluation = json.loads((output / "eval_log.txt").read_text().splitlines()[-1])
        assert (evaluation["clips"], evaluation["unreadable"]) == (7, 0)
        weights = torch.load(output / "checkpoint.pt", weights_only=False)["state_dict"]
        found.append(({k: v for k, v in evaluation.items() if "map" in k or "ndcg" in k or "top" in k}, weights))
    assert found[0][0] == found[1][0] and len(found[0][0]) >= 6
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
