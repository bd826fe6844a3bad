import dataclasses
import os
import time

import pytest
import torch

from avion.engine import distributed
from avion.engine.distributed import PeerError, World, choose_device, detect_launch, first_host, init_world
from avion.engine.options import PretrainOptions
from avion.errors import UserError
from tests.processes import free_port, run_processes

ARGS = PretrainOptions(device="cpu", dist_timeout=1.0)


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,9]", "gpu03"),
        ("a-b[7,9]-x,c", "a-b7-x"),
        ("n[1-2],m", "n1"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_a_plain_start_is_alone():
    launch = detect_launch(ARGS, {})
    assert (launch.rank, launch.size) == (0, 1)


def test_torchrun():
    launch = detect_launch(ARGS, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (launch.rank, launch.size, launch.local_rank, launch.url) == (5, 8, 1, "env://")


SRUN = {
    "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
}  # fmt: skip


def test_srun():
    launch = detect_launch(ARGS, SRUN)
    assert (launch.rank, launch.size, launch.local_rank) == (3, 4, 1)
    host, port = launch.url.removeprefix("tcp://").split(":")
    assert host == "node07" and 15000 <= int(port) < 30000
    assert detect_launch(ARGS, {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).url == launch.url


def test_a_plain_python_inside_an_sbatch_script_waits_for_nobody():
    batch_shell = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODELIST": "n1"}
    assert detect_launch(ARGS, batch_shell).size == 1


@pytest.mark.parametrize(
    "env, message",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number, found 'x'"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
    ],
)
def test_broken_launch_variables(env, message):
    with pytest.raises(UserError, match=message):
        detect_launch(ARGS, env)


def test_world_size_by_hand_needs_a_meeting_point():
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT"):
        detect_launch(dataclasses.replace(ARGS, world_size=2), {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the error of a machine without GPUs")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        choose_device("cuda", None, 0)
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        choose_device("auto", 1, 0)
    assert choose_device("auto", None, 0) == torch.device("cpu")


def test_alone_every_message_is_the_value_itself():
    world = World()
    assert world.gather(3) == [3] and world.broadcast("x") == "x" and world.any(True) and world.mean([2.0]) == [2.0]
    world.agree({"a": 1})
    with pytest.raises(KeyError), world.together("nothing"):
        raise KeyError("as it is")


def _conversation(rank, size):
    world = init_world(ARGS)
    assert (world.rank, world.size, world.is_main) == (rank, size, rank == 0)
    results = {
        "gather": world.gather({"rank": rank}),
        "broadcast": world.broadcast(f"from {rank}"),
        "any": [world.any(rank == 1), world.any(False)],
        "mean": world.mean([float(rank), 4.0]),
    }
    world.agree({"same": 1, "NaN": float("nan")})
    try:
        world.agree({"same": 1, "--lr": rank})
    except UserError as e:
        results["disagree"] = str(e)
    try:
        with world.together("reading"):
            if rank == 1:
                raise UserError("b.csv: no such file")
        results["together"] = "nothing"
    except UserError as e:
        results["together"] = (type(e), str(e))
    distributed.shutdown()
    return results


def test_processes_talk_agree_and_fail_together(tmp_path):
    first, second = run_processes(_conversation, 2, tmp_path)
    for results in (first, second):
        assert results["gather"] == [{"rank": 0}, {"rank": 1}]
        assert results["broadcast"] == "from 0"
        assert results["any"] == [True, False]
        assert results["mean"] == [0.5, 4.0]
        assert "disagree on --lr (process 0: 0, process 1: 1)" in results["disagree"]
    assert first["together"] == (PeerError, "reading failed on process 1: b.csv: no such file")
    assert second["together"] == (UserError, "b.csv: no such file")


def test_a_missing_process_is_an_error_not_a_hang(monkeypatch):
    args = dataclasses.replace(
        ARGS, world_size=2, rank=0, dist_url=f"tcp://127.0.0.1:{free_port()}", dist_timeout=2 / 60
    )
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    with pytest.raises(UserError, match="process 0 of 2 .* could not meet the others"):
        init_world(args, os.environ)
    assert time.monotonic() - start < 60
