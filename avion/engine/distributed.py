"""Processes: who am I, how do we meet, what do we agree on.

One code path for plain `python`, `torchrun`, `srun` and flags by hand. A single process needs no
process group and none is started. Control messages (agreement, errors, gathered features) travel over a
gloo group on the CPU, so that they never wait for the GPU.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from avion.errors import UserError
from avion.numbers import PORT, PROCESSES, RANK, shown, whole

from . import signals
from .peers import PeerError
from .signals import Stopped

_FAILED = 1 << 10  # as a message: larger than any signal's number


@dataclass(frozen=True)
class Launch:
    """What the launcher said: this process's number, how many there are, where they meet."""

    rank: int
    size: int
    local_rank: int
    url: str
    by: str
    own_gpus: int | None = None  # how many GPUs the launcher was asked to give each process, where it says so


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "gpu[03-05,9],cpu1" -> "gpu03", "rack[1-2]n[01-16]" -> "rack1n01"."""
    match = re.match(r"(?:[^,\[\]\s]|\[\w[\w,-]*\])+(?=,|$)", nodelist)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST: cannot read a host name from {nodelist!r}; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match.group())


_JOB = whole(0, 2**63 - 1)
_VARIABLES = {
    "RANK": RANK, "LOCAL_RANK": RANK, "WORLD_SIZE": PROCESSES, "MASTER_PORT": PORT, "SLURM_PROCID": RANK,
    "SLURM_LOCALID": RANK, "SLURM_STEP_NUM_TASKS": PROCESSES, "SLURM_JOB_ID": _JOB, "SLURM_STEP_ID": _JOB,
}  # fmt: skip


def _integer(env: Mapping[str, str], name: str) -> int:
    within = _VARIABLES[name]
    try:
        return int(within.read(env[name]))
    except KeyError:
        raise UserError(f"environment: {name} is not set though its launcher's other variables are") from None
    except ValueError as e:
        raise UserError(f"environment: {name} must be {within}, found {shown(env[name])}") from e


def meeting_port(job: int, step: int = 0) -> int:
    """A port that all tasks of a job's step agree on without talking, clear of the ephemeral ones; jobs that share a
    node differ in it."""
    return 15000 + (7 * job + step) % 15000


def detect_launch(args: Any, env: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables, else srun's, else the flags.

    Only variables that a launched task has count: inside an sbatch script or salloc shell, SLURM_NTASKS is
    set too, but a plain `python` there is alone and must not wait for others.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        # Scripts that set the first two by hand under srun often forget the third.
        name = next((n for n in ("LOCAL_RANK", "SLURM_LOCALID") if n in env), None)
        local = args.local_rank if name is None or (name != "LOCAL_RANK" and args.local_rank) else _integer(env, name)
        launch = Launch(_integer(env, "RANK"), _integer(env, "WORLD_SIZE"), local, "env://", "torchrun")
    elif "SLURM_STEP_NUM_TASKS" in env and _integer(env, "SLURM_STEP_NUM_TASKS") > 1:
        # MASTER_ADDR and MASTER_PORT only where they were set by hand.
        host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
        job, step = (_integer(env, name) if name in env else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = _integer(env, "MASTER_PORT") if env.get("MASTER_PORT") else meeting_port(job, step)
        launch = Launch(
            _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_STEP_NUM_TASKS"), _integer(env, "SLURM_LOCALID"),
            f"tcp://{host}:{port}", "srun", _gpus_per_task(env.get("SLURM_GPUS_PER_TASK", "")),
        )  # fmt: skip
    else:
        launch = Launch(args.rank, args.world_size, args.local_rank, args.dist_url, "flags")
        if launch.size > 1 and launch.url == "env://" and not {"MASTER_ADDR", "MASTER_PORT"} <= set(env):
            raise UserError(
                f"--world-size {launch.size} with --dist-url env:// needs MASTER_ADDR and MASTER_PORT; set them, "
                "give --dist-url tcp://host:port, or start with torchrun"
            )
    if launch.size > 1 and launch.url == "env://" and env.get("MASTER_PORT"):
        _integer(env, "MASTER_PORT")
    if not 0 <= launch.rank < launch.size:
        raise UserError(f"rank {launch.rank} of {launch.size} processes ({launch.by}) does not exist; ranks begin at 0")
    return launch


def _gpus_per_task(text: str) -> int | None:
    """SLURM's "2" and "a100:2"; None for anything else."""
    match = re.fullmatch(r"(?:[^:,]+:)?(\d+)", text)
    return int(match[1]) if match else None


def _seen(count: int) -> str:
    """What a process sees of its machine's GPUs, for errors: the machine may have more."""
    seen = f"PyTorch sees {count or 'no'} GPU{'' if count == 1 else 's'}"
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen if limit is None else f"{seen} (CUDA_VISIBLE_DEVICES is {limit!r})"


def choose_device(name: str, gpu: int | None, local_rank: int, own_gpus: int | None = None) -> torch.device:
    """`--device` and `--gpu` to a torch device; a clear error where there is no such GPU.

    Without `--gpu` the device is that of the process's number on its machine, but for processes that see GPUs of
    their own and no others, which count them from 0: where one GPU is visible, and where as many are as the launcher
    was asked to give each process (`own_gpus`).
    """
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if name == "cuda" or gpu is not None:
            raise UserError(f"--device cuda: {_seen(0)}; check the driver, or use --device cpu")
        return torch.device("cpu")
    index = gpu if gpu is not None else 0 if count in (1, own_gpus) else local_rank
    if not 0 <= index < count:
        cure = "change --gpu" if gpu is not None else "start fewer processes on this machine or let them see more GPUs"
        raise UserError(f"GPU {index} (counted from 0) does not exist: {_seen(count)}; {cure}")
    return torch.device("cuda", index)


class World:
    """The processes of a run, this one's place in it, and its device."""

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu", control=None, how: str = "alone"
    ):
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.how = how  # the processes came together, for the log
        self._control = control

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process, in rank order, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on at least one process."""
        return bool(self.most(int(flag)))

    def most(self, number: int) -> int:
        """The largest of the processes' numbers, on every process. A CPU message of four bytes."""
        if self.size == 1:
            return number
        value = torch.tensor([number], dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control)
        return int(value.item())

    def go_on(self, error: Exception | None, what: str) -> int:
        """Between two steps: an error of any process (`what` it could not do) stops all of them.

        Returns the number of the signal that asked some process to stop, 0 if none was; it is the same on all. One
        message of four bytes says both.
        """
        number = self.most(signals.asked() if error is None else _FAILED)
        if number >= _FAILED:
            raise error or PeerError(f"another process could not {what}")
        return number

    def stop_if_asked(self, where: str) -> None:
        """Raise Stopped on all processes if a signal asked one of them to stop; nothing is to be written here."""
        number = self.most(signals.asked())
        if number:
            raise Stopped(f"{signals.name(number)} {where}")

    def mean(self, values: list[float]) -> list[float]:
        """Means over the processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return (total / self.size).tolist()

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Leave this block on all processes or on none.

        An error on one process is raised on the others too, so that nobody waits for a process that has
        given up; Stopped on one is Stopped on all. The block must not communicate: an error before its first message
        would leave the rest waiting.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            if self.size == 1:
                raise
            error = e
        if self.size == 1:
            return
        own = None if error is None else (isinstance(error, Stopped), str(error) or type(error).__name__)
        errors = [(rank, *e) for rank, e in enumerate(self.gather(own)) if e is not None]
        if error is not None and not isinstance(error, Stopped):
            raise error
        for rank, stopped, text in errors:
            if not stopped:
                raise PeerError(f"{what} failed on process {rank}: {text}")
        if errors:
            raise Stopped(errors[0][2])

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError on all processes where they differ in any of the named values."""
        everyone = self.gather(dict(facts))
        for name in facts:
            values = [other.get(name) for other in everyone]
            if any(v != values[0] and not (v != v and values[0] != values[0]) for v in values):  # NaN agrees with NaN
                listed = ", ".join(f"process {r}: {v!r}" for r, v in enumerate(values))
                raise UserError(
                    f"processes disagree on {name} ({listed}); start all of them with the same flags, code and data"
                )


def refuse_shared_gpus(world: World) -> None:
    """UserError on all processes where two of them would use one GPU, which nccl cannot."""
    card = torch.cuda.get_device_properties(world.device)
    cards = world.gather((str(getattr(card, "uuid", "")), world.device.index, torch.cuda.device_count()))
    for rank, (uuid, index, count) in enumerate(cards):
        first = [other[0] for other in cards].index(uuid)
        if uuid and first < rank:
            raise UserError(
                f"processes {first} and {rank} would both use one GPU (number {index} of the {count} that process "
                f"{rank} sees); start no more processes than GPUs, let each process see all of them or its own "
                "(CUDA_VISIBLE_DEVICES), and give each its number (--local_rank) where no launcher does"
            )


def init_world(args: Any, env: Mapping[str, str] = os.environ) -> World:
    """Find the other processes and meet them; the device is chosen on the way.

    A single process starts no process group.
    """
    launch = detect_launch(args, env)
    device = choose_device(args.device, args.gpu, launch.local_rank, launch.own_gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1:
        return World(device=device)
    timeout = datetime.timedelta(minutes=args.dist_timeout)
    backend = args.dist_backend if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=launch.url, rank=launch.rank, world_size=launch.size, timeout=timeout
        )
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"process {launch.rank} of {launch.size} ({launch.by}) could not meet the others at {launch.url}: "
            f"{str(e).splitlines()[0]}"
        ) from e
    control = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else None
    world = World(launch.rank, launch.size, device, control, how=f"{launch.by}, {backend}")
    if backend == "nccl":
        try:
            refuse_shared_gpus(world)
        except UserError:
            shutdown()
            raise
    return world


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
