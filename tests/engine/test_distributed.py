import dataclasses
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from avion.engine import distributed, signals
from avion.engine.distributed import World, choose_device, init_world
from avion.engine.options import PretrainOptions
from avion.engine.peers import PeerError, detect_launch, first_host
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
        ("rack[1-2]n[01-16],x", "rack1n01"),
        ("gpu1.site.org", "gpu1.site.org"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "gpu[", "gpu[1-", "a[],b", "[", "gpu[01-02"])
def test_a_node_list_that_cannot_be_read(nodelist):
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST: cannot read a host name .* set MASTER_ADDR"):
        first_host(nodelist)


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


def test_meeting_points_set_by_hand_and_jobs_beside_each_other():
    by_hand = detect_launch(ARGS, {**SRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert by_hand.url == "tcp://10.0.0.7:4000"
    urls = {detect_launch(ARGS, {**SRUN, "SLURM_JOB_ID": str(job)}).url for job in range(120, 140)}
    steps = {detect_launch(ARGS, {**SRUN, "SLURM_STEP_ID": str(step)}).url for step in range(5)}
    assert len(urls) == 20 and len(steps) == 5


@pytest.fixture
def visible(monkeypatch):
    """PyTorch as in a process that sees so many GPUs; CUDA_VISIBLE_DEVICES as given."""

    def visible(count, devices=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if devices is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)

    return visible


def device_of(env, args=ARGS):
    """The GPU's number as `init_world` chooses it."""
    launch = detect_launch(args, env)
    return choose_device("auto", args.gpu, launch.local_rank, launch.own_gpus).index


def task(local, per_node=8, **env):
    return {
        **SRUN,
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": str(per_node + local),
        "SLURM_LOCALID": str(local),
        **env,
    }


@pytest.mark.parametrize(
    "count, per_task, devices",
    [
        (8, {}, range(8)),  # --gpus-per-node=8
        (8, {"SLURM_GPUS_PER_TASK": "1"}, range(8)),  # --gpus-per-task=1 --gpu-bind=none: all are seen by all
        (8, {"SLURM_GPUS_PER_TASK": "h100:1"}, range(8)),
        (1, {"SLURM_GPUS_PER_TASK": "1"}, [0] * 8),  # --gpus-per-task=1: each sees its own
        (1, {}, [0] * 8),  # --gpus-per-node=8 --gpu-bind=single:1, or a script that sets CUDA_VISIBLE_DEVICES
        (2, {"SLURM_GPUS_PER_TASK": "2"}, [0] * 8),  # --gpus-per-task=2: each sees its own two
        (16, {"SLURM_GPUS_PER_TASK": "2"}, range(8)),  # the same with --gpu-bind=none
    ],
)
def test_devices_of_srun_s_tasks(visible, count, per_task, devices):
    visible(count)
    assert [device_of(task(local, **per_task)) for local in range(8)] == list(devices)


@pytest.mark.parametrize(
    "count, size, devices", [(8, 8, range(8)), (4, 4, range(4)), (8, 4, range(4)), (1, 4, [0] * 4)]
)
def test_devices_of_torchrun_s_processes(visible, count, size, devices):
    """What SLURM gave the agent's one task says nothing about the agent's processes."""
    visible(count)
    for more in ({}, {"SLURM_GPUS_PER_TASK": str(count), "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}):
        env = {"RANK": "0", "WORLD_SIZE": str(size), **more}
        assert [device_of({**env, "LOCAL_RANK": str(local)}) for local in range(size)] == list(devices)


@pytest.mark.parametrize("count, devices", [(8, range(4)), (4, range(4)), (1, [0] * 4)])
def test_devices_of_processes_started_by_hand(visible, count, devices):
    visible(count)
    by_hand = [dataclasses.replace(ARGS, local_rank=local) for local in range(4)]
    assert [device_of({}, args) for args in by_hand] == list(devices)
    rank_and_size = {"RANK": "0", "WORLD_SIZE": "4"}  # without LOCAL_RANK
    assert [device_of(rank_and_size, args) for args in by_hand] == list(devices)
    assert [device_of({**rank_and_size, "SLURM_LOCALID": str(k)}) for k in range(4)] == list(devices)


@pytest.mark.parametrize("count, gpu", [(1, 0), (4, 3), (8, 5)])
def test_the_gpu_that_was_asked_for(visible, count, gpu):
    visible(count)
    args = dataclasses.replace(ARGS, gpu=gpu)
    for env in ({}, {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}, task(2), task(2, SLURM_GPUS_PER_TASK="1")):
        assert device_of(env, args) == gpu


@pytest.mark.parametrize(
    "count, devices, gpu, local, message",
    [
        (
            1,
            "3",
            1,
            0,
            "GPU 1 .counted from 0. does not exist: PyTorch sees 1 GPU .CUDA_VISIBLE_DEVICES is '3'.; change --gpu",
        ),
        (4, None, None, 4, "GPU 4 .* PyTorch sees 4 GPUs; start fewer processes on this machine or let them see more"),
        (8, None, 8, 0, "GPU 8 .* PyTorch sees 8 GPUs; change --gpu"),
        (4, "4,5,6,7", None, 5, "GPU 5 .* PyTorch sees 4 GPUs .CUDA_VISIBLE_DEVICES is '4,5,6,7'.; start fewer"),
        (4, None, -1, 0, "GPU -1 .* does not exist"),
        (4, None, None, -1, "GPU -1 .* does not exist"),
        (0, "", 0, 0, "--device cuda: PyTorch sees no GPUs .CUDA_VISIBLE_DEVICES is ''.; check the driver"),
    ],
)
def test_gpus_that_are_not_there(visible, count, devices, gpu, local, message):
    visible(count, devices)
    with pytest.raises(UserError, match=message) as error:
        choose_device("auto", gpu, local)
    assert "machine has" not in str(error.value)


@pytest.mark.parametrize(
    "text, count",
    [("1", 1), ("8", 8), ("a100:2", 2), ("", None), ("a100:1,v100:1", None), ("many", None), ("a:b:1", None)],
)
def test_slurms_gpus_per_task(text, count):
    assert detect_launch(ARGS, {**SRUN, "SLURM_GPUS_PER_TASK": text}).own_gpus == count


class Cards(World):
    """A process on GPU `index` of `count`, among others that the test made up: (uuid, index, count)."""

    def __init__(self, monkeypatch, others, index, count):
        super().__init__(0, 1 + len(others), torch.device("cuda", index))
        self.others = others
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"card {device.index}")
        )
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    def gather(self, value):
        return [value, *self.others]


def test_two_processes_on_one_gpu_are_refused(monkeypatch):
    for others in ([("card 1", 1, 8), ("card 2", 2, 8)], [("other node's card 0", 0, 1)], [("", 0, 1)]):
        distributed.refuse_shared_gpus(Cards(monkeypatch, others, 0, 8))
    world = Cards(monkeypatch, [("card 1", 1, 4), ("card 0", 0, 1)], 0, 4)
    with pytest.raises(UserError, match="processes 0 and 2 would both use one GPU .number 0 of the 1 that process 2"):
        distributed.refuse_shared_gpus(world)


def test_a_step_of_one_task_is_alone():
    assert detect_launch(ARGS, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).size == 1


def test_a_plain_python_inside_an_sbatch_script_waits_for_nobody():
    batch_shell = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODELIST": "n1"}
    assert detect_launch(ARGS, batch_shell).size == 1


@pytest.mark.parametrize(
    "env, message",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0 to 65535, found 'x'"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
        (
            {**SRUN, "SLURM_JOB_ID": "seven"},
            "SLURM_JOB_ID must be a whole number from 0 to 9223372036854775807, found 'seven'",
        ),
        ({**SRUN, "MASTER_PORT": "high"}, "MASTER_PORT must be a whole number from 1 to 65535, found 'high'"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"},
            "MASTER_PORT must be a whole number from 1 to 65535",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0 to 65535, found '-1'"),
        ({**SRUN, "SLURM_PROCID": "4"}, "rank 4 of 4 processes .srun. does not exist"),
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
    with pytest.raises(UserError, match="PyTorch sees no GPUs"):
        choose_device("cuda", None, 0)
    with pytest.raises(UserError, match="PyTorch sees no GPUs"):
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


def _under_slurm(rank, size, job):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(
        SLURM_JOB_ID=job,
        SLURM_STEP_ID="1",
        SLURM_STEP_NUM_TASKS=str(size),
        SLURM_NTASKS=str(size),
        SLURM_PROCID=str(rank),
        SLURM_NODEID=str(rank // 2),
        SLURM_LOCALID=str(rank % 2),
        SLURM_STEP_NODELIST="localhost,nowhere[07-09]",
        SLURM_JOB_NODELIST="elsewhere[1-4]",
    )
    world = init_world(ARGS)
    found = world.gather((world.rank, world.size, world.how))
    distributed.shutdown()
    return found


def test_processes_of_several_nodes_meet_on_the_first(tmp_path):
    """Started with nothing but SLURM's variables of a step of two tasks a node."""
    found = run_processes(_under_slurm, 4, tmp_path, str(free_port()))
    assert found == [[(rank, 4, "srun, gloo") for rank in range(4)]] * 4


def _stopping(rank, size):
    """What `together`, `go_on` and `stop_if_asked` make of a signal to one process, and of one with another's error."""
    world, results = init_world(ARGS), []
    with signals.heeded():
        results.append(world.go_on(None, "read"))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        results.append(world.go_on(None, "read"))
        for body in (
            lambda: world.stop_if_asked("here"),
            lambda: _together(world, lambda: signals.raise_if_asked("inside")),
            lambda: world.go_on(UserError("no such file") if rank == 0 else None, "reading the data"),
            lambda: _together(world, lambda: _both(rank)),
        ):
            try:
                body()
            except Exception as e:
                results.append((type(e), str(e)))
    distributed.shutdown()
    return results


def _both(rank):
    if rank == 0:
        raise UserError("no such file")
    signals.raise_if_asked("inside")


def _together(world, body):
    with world.together("reading"):
        body()


def test_a_signal_to_one_process_stops_all_and_an_error_comes_first(tmp_path):
    first, second = run_processes(_stopping, 2, tmp_path)
    same = [
        0,
        signal.SIGUSR1,
        (signals.Stopped, "SIGUSR1 here"),
        (signals.Stopped, "SIGUSR1 inside"),
    ]
    mine = (UserError, "no such file")
    assert first == [*same, mine, mine]
    peers = "reading the data failed on process 0: no such file", "reading failed on process 0: no such file"
    assert second == [*same, *((PeerError, text) for text in peers)]


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
