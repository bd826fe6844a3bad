import argparse
import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from avion.errors import UserError
from avion.utils import distributed
from tests.processes import run_processes

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def alone(monkeypatch):
    """No launcher's variables; whatever group a test starts is left."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_process_that_is_alone_has_a_group_of_its_own(alone, capsys):
    args = argparse.Namespace(gpu=None)  # a script without the other flags
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    distributed.init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size) == (False, 0, 1)
    assert capsys.readouterr().out == "Not using distributed mode\n"
    distributed.init_distributed_mode(args)  # a second time changes nothing
    gathered = [torch.zeros(2)]
    dist.all_gather(gathered, torch.tensor([1.0, 2.0]))
    assert gathered[0].tolist() == [1.0, 2.0]
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_a_gpu_that_is_not_there(alone):
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        distributed.init_distributed_mode(argparse.Namespace(gpu=1))


def test_a_launcher_whose_variables_do_not_fit(alone, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="rank 2 of 2 processes"):
        distributed.init_distributed_mode(argparse.Namespace())


def _two(rank, size, folder, by_flags):
    if by_flags:
        port = os.environ["MASTER_PORT"]
        for name in LAUNCHERS:
            os.environ.pop(name, None)
        args = argparse.Namespace(rank=rank, world_size=size, dist_url=f"tcp://127.0.0.1:{port}", dist_backend="nccl")
    else:
        args = argparse.Namespace(rank=0, world_size=1, dist_url="env://", dist_backend="nccl", gpu=None)
    distributed.init_distributed_mode(args)
    distributed.random_seed(5, distributed.get_rank())
    draws = random.random(), np.random.rand(), torch.rand(()).item()
    distributed.save_on_master({"weights": torch.full((3,), float(rank))}, rank == 0, folder)
    dist.barrier()
    return vars(args), distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process(), draws


@pytest.mark.parametrize("by_flags", [False, True])
def test_two_processes(tmp_path, by_flags):
    first, second = run_processes(_two, 2, tmp_path / "run", tmp_path / "out", by_flags)
    for rank, (args, found_rank, size, is_main, draws) in enumerate((first, second)):
        assert (args["distributed"], args["rank"], args["world_size"], args["dist_backend"]) == (True, rank, 2, "gloo")
        assert (found_rank, size, is_main) == (rank, 2, rank == 0)
        for start in (random.seed, np.random.seed, torch.manual_seed):
            start(5 + rank)
        assert draws == (random.random(), np.random.rand(), torch.rand(()).item())
    for name in ("checkpoint.pt", "checkpoint_best.pt"):
        assert torch.load(tmp_path / "out" / name)["weights"].tolist() == [0.0] * 3  # process 0's


def test_saving_keeps_the_best_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    distributed.save_on_master({"epoch": 1}, True, tmp_path)
    distributed.save_on_master({"epoch": 2}, False, str(tmp_path))
    epochs = [torch.load(tmp_path / name)["epoch"] for name in ("checkpoint.pt", "checkpoint_best.pt")]
    assert epochs == [2, 1]

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="checkpoint.pt: cannot be written"):
        distributed.save_on_master({"epoch": 3}, True, tmp_path)
    monkeypatch.undo()
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint_best.pt"]


def test_the_model_inside_a_wrapper():
    model = nn.Linear(2, 2)
    assert distributed.get_model(model) is model
    assert distributed.get_model(nn.DataParallel(model)) is model
