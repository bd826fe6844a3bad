import copy
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from avion.engine import state
from avion.errors import UserError
from avion.optim import build_optimizer


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn()

    np.random.randn()  # leaves a cached value behind, which is part of the state
    torch.save(state.rng_state(torch.device("cpu")), tmp_path / "rng.pt")
    expected = draw()
    draw()
    state.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), torch.device("cpu"))
    assert draw() == expected


SAVE = """
import resource, sys
from pathlib import Path
import torch
from avion.engine.state import copy_atomically, save_atomically
from avion.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
folder = Path(sys.argv[1])
for write in (
    lambda: save_atomically({"x": torch.zeros(1 << 20)}, folder / "checkpoint.pt", before=lambda: print("too early")),
    lambda: copy_atomically(folder / "large", folder / "checkpoint.pt"),
):
    try:
        write()
    except UserError as e:
        print(e)
"""


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    """What PyTorch's zip writer makes of a real limit on sizes; tests/test_files.py does the same on a full disk."""
    path = tmp_path / "checkpoint.pt"
    state.save_atomically({"epoch": 1}, path)
    (tmp_path / "large").write_bytes(bytes(1 << 21))
    done = subprocess.run([sys.executable, "-c", SAVE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    line = f"{path}: cannot be written (File too large); free space or change --output-dir\n"
    assert done.stdout == 2 * line, done.stderr
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "large"]


def test_an_interrupt_leaves_no_partial_file(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.save_atomically({"epoch": 1}, tmp_path / "checkpoint.pt", before=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_copy_replaces_the_target_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"older and longer")
    state.copy_atomically(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_of_an_older_pytorch_goes_on(name):
    """Its groups lack what was added since; what they say is kept."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, name, lr=0.1, weight_decay=0.2)
    model.weight.grad, model.bias.grad = torch.randn(2, 3), torch.randn(2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in group.keys() - {"params", "lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov"}:
            del group[key]
    twin = copy.deepcopy(model)
    fresh = build_optimizer(twin, name, lr=0.5, weight_decay=0.2)
    state.restore_optimizer(fresh, saved, "a.pt", name)
    for one, its in ((model, optimizer), (twin, fresh)):
        one.weight.grad, one.bias.grad = torch.full((2, 3), 0.3), torch.full((2,), 0.7)
        its.step()
    torch.testing.assert_close(twin.weight, model.weight)
    torch.testing.assert_close(twin.bias, model.bias)
    other = "adamw" if name == "sgd" else "sgd"
    with pytest.raises(UserError, match=f"a.pt: its optimizer state does not fit --optimizer {other} .it has no"):
        state.restore_optimizer(build_optimizer(twin, other, lr=0.5, weight_decay=0.0), saved, "a.pt", other)
