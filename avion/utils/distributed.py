"""AVION's `avion.utils.distributed`: what its scripts ask about processes, and how they save.

By default `torch.load` reads nothing but tensors and plain values. Importing this file lets it also read what AVION
puts into its checkpoints: `argparse.Namespace` (the flags) and numpy's numbers (the best metric).
"""

import argparse
import datetime
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from avion.engine.distributed import choose_device, prepare_to_meet
from avion.engine.options import DeviceOptions
from avion.engine.peers import detect_launch
from avion.engine.run_files import BEST, LATEST
from avion.engine.state import copy_atomically, save_atomically
from avion.weights.files import extend_torch_load

extend_torch_load()


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Find the other processes of this run, and join their process group.

    The launchers are those of this project's entry points (torchrun, srun with several tasks); without a launcher,
    `args.rank`, `args.world_size` and `args.dist_url` count. The function sets `args.rank`, `args.world_size`,
    `args.gpu` (None without a GPU), `args.dist_backend` ("gloo" without a GPU) and `args.distributed`. A process that
    was started alone gets a process group of its own, so that a script may gather without asking, and
    `args.distributed` is False, as in AVION.

    Unlike AVION's function, this one leaves `print` as it is: every process prints.

    Args:
        args: The flags of the script.

    Raises:
        UserError: The variables of a launcher do not fit together, or a GPU does not exist.
    """
    launched = {"RANK", "WORLD_SIZE"} <= set(os.environ)
    options = _device_options(args)
    launch = detect_launch(options)
    device = choose_device("auto", None if launched else getattr(args, "gpu", None), launch.local_rank, launch.own_gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    args.rank, args.world_size, args.gpu = launch.rank, launch.size, device.index
    args.distributed = launched or launch.size > 1
    args.dist_backend = options.dist_backend if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=30)
    prepare_to_meet()
    if not args.distributed:
        print("Not using distributed mode")
        if is_dist_avail_and_initialized():
            return
        dist.init_process_group(args.dist_backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    print(f"process {launch.rank} of {launch.size} ({launch.by}, {args.dist_backend}): {launch.url}", flush=True)
    dist.init_process_group(
        args.dist_backend, init_method=launch.url, rank=launch.rank, world_size=launch.size, timeout=timeout
    )
    dist.barrier()


def _device_options(args: argparse.Namespace) -> DeviceOptions:
    """Return the flags of `args` about processes, with AVION's defaults for those that a script may not have."""
    names = ("rank", "world_size", "local_rank", "dist_url", "dist_backend")
    return DeviceOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def is_dist_avail_and_initialized() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the number of this process; 0 without a process group."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is process 0."""
    return get_rank() == 0


def get_model(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel or DistributedDataParallel, and any other model unchanged."""
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return model.module if wrapped else model


def random_seed(seed: int = 42, rank: int = 0) -> None:
    """Seed the generators of torch, numpy and Python with seed + rank."""
    for start in (torch.manual_seed, np.random.seed, random.seed):
        start(seed + rank)


def save_on_master(state: Mapping[str, Any], is_best: bool, output_dir: str | os.PathLike) -> None:
    """Save a checkpoint on process 0: {output_dir}/checkpoint.pt, whole or not at all.

    Args:
        state: The content of the checkpoint.
        is_best: Whether the same is also saved as checkpoint_best.pt.
        output_dir: The folder.

    Raises:
        UserError: The file cannot be written.
    """
    if not is_main_process():
        return
    folder = Path(output_dir)
    save_atomically(state, folder / LATEST)
    if is_best:
        copy_atomically(folder / LATEST, folder / BEST)
