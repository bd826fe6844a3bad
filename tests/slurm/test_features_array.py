"""An array of jobs on a real SLURM shares out the videos of a folder: slurm/features.sbatch."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from avion.commands import extract_features
from avion.constants import NORM_STYLES
from avion.features import read
from avion.weights import save_weights
from tests.models.tiny import tiny_model
from tests.slurm.cluster import cluster, missing
from tests.videos import write_video

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_an_array_of_jobs(tmp_path):
    for v in range(5):
        write_video(tmp_path / f"videos/{v}.mp4", 30, first=100 * v, fps=10)
    torch.manual_seed(1)
    preprocess = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}
    save_weights(tiny_model("TIMEMAMBA_VITB16"), tmp_path / "checkpoint.pt", preprocess)
    flags = ["--checkpoint", tmp_path / "checkpoint.pt", "--root", tmp_path / "videos", "--window", "1"]
    flags = [str(word) for word in [*flags, "--workers", "0", "--device", "cpu"]]
    with cluster() as environment:
        submitted = subprocess.run(
            [
                "sbatch",
                "--parsable",
                "--array=4-6",
                "--gpus-per-node=0",
                "--cpus-per-task=1",
                f"--output={tmp_path}/%a.log",
                "slurm/features.sbatch",
                *flags,
                "--output-dir",
                tmp_path / "array",
            ],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
        )
        assert submitted.returncode == 0, submitted.stderr
        give_up = time.monotonic() + 200
        while time.monotonic() < give_up:
            logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
            if sum(f"{tmp_path / 'array'}: " in text for text in logs.values()) == 3:
                break
            time.sleep(0.5)
    ends = {name: text.splitlines()[-1].rpartition(": ")[2] for name, text in logs.items()}
    assert ends == {"4": "2 videos", "5": "2 videos", "6": "1 videos"}, logs
    assert extract_features.main([*flags, "--output-dir", str(tmp_path / "alone")]) == 0
    one, two = read(tmp_path / "array"), read(tmp_path / "alone")
    assert sorted(one) == sorted(two) == ["0", "1", "2", "3", "4"]
    for name in one:
        np.testing.assert_allclose(one[name].clip, two[name].clip, rtol=1e-4, atol=1e-5)
