import random

import numpy as np
import pytest
import torch

from avion.engine import state
from avion.errors import UserError


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn()

    np.random.randn()  # leaves a cached value behind, which is part of the state
    torch.save(state.rng_state(torch.device("cpu")), tmp_path / "rng.pt")
    expected = draw()
    draw()
    state.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), torch.device("cpu"))
    assert draw() == expected


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    state.save_atomically({"epoch": 1}, path)

    def disk_full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(UserError, match=r"checkpoint.pt: cannot be written \(No space left on device\)"):
        state.save_atomically({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_copy_replaces_the_target_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"older and longer")
    state.copy_atomically(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2
