"""Run a function in several processes that form a gloo group, and collect what it returns."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(rank: int, size: int, port: int, folder: str, function: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
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
    # The fork server imports what takes seconds once, for all processes of all tests.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "avion.engine.run"])
    port = free_port()
    children = [context.Process(target=_child, args=(r, size, port, str(folder), function, args)) for r in range(size)]
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
