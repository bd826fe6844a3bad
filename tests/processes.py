"""Run a function in several processes that form a gloo group, and collect what it returns."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What the fork server imports once, for all processes of all tests. Optimizers need PyTorch's compiler, and ZeRO its
# sharded tensors; a process that had to import them itself would take seconds.
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.optim",
    "numpy",
    "avion.engine.egoschema",
    "avion.engine.run",
    "avion.engine.tasks.pretrain",
    "avion.engine.zeroshot",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def agent() -> list[str]:
    """The words before a script that start it in two processes, with this project's torchrun."""
    return [sys.executable, "-m", "avion.engine.torchrun", "--nproc-per-node=2", f"--master-port={free_port()}"]


def next_meeting() -> None:
    """Let the next group of these processes meet at a port of its own.

    A process that meets at the old port before process 0 has closed it reads addresses of the group that has ended, and
    waits for them.
    """
    port, *more = os.environ["TEST_PORTS"].split()
    os.environ.update(MASTER_PORT=port, TEST_PORTS=" ".join(more))


def _child(rank: int, size: int, ports: list[int], folder: str, function: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        TEST_PORTS=" ".join(map(str, ports)),
    )
    next_meeting()
    torch.set_num_threads(1)
    try:
        result = (True, function(rank, size, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(result))


def run_processes(function: Callable, size: int, folder: Path, *args) -> list:
    """`function(rank, size, *args)` in `size` fresh processes; its results in rank order.

    `function` belongs to an importable module; the processes' torchrun-style environment is set. An exception in any
    process fails the test with that process's traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ports = [free_port() for _ in range(4)]
    children = [context.Process(target=_child, args=(r, size, ports, str(folder), function, args)) for r in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=240)
    alive = [c for c in children if c.is_alive()]
    for child in alive:
        child.kill()
    assert not alive, f"{len(alive)} of {size} processes did not finish"
    results = [pickle.loads(Path(folder, f"{r}.pkl").read_bytes()) for r in range(size)]
    for rank, (fine, value) in enumerate(results):
        assert fine, f"process {rank}:\n{value}"
    return [value for _, value in results]
