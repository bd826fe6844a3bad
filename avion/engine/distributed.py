"""The processes of a run: how they meet, what they agree on, and how they fail together.

Processes that plain `python`, `torchrun`, `srun` or flags start all go through the same code (`avion.engine.peers`). A
single process needs no process group, and none is started. Control messages (agreement, errors, gathered features)
travel over a gloo group on the CPU, so that they never wait for the GPU.
"""

import atexit
import contextlib
import datetime
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from avion.errors import UserError

from . import signals
from .options.shared import DeviceOptions
from .peers import LostPeer, PeerError, detect_launch
from .signals import Stopped
from .watch import Watch

logger = logging.getLogger(__name__)

_FAILED = 1 << 10  # as a message: larger than any signal's number


def one_line(error: BaseException) -> str:
    """Return an error as one line, which other processes can be sent."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if isinstance(error, UserError | Stopped) else f"{type(error).__name__}: {lines[0]}"


def _seen(count: int) -> str:
    """Say how many GPUs this process sees, for errors: the machine may have more."""
    seen = f"PyTorch sees {count or 'no'} GPU{'' if count == 1 else 's'}"
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen if limit is None else f"{seen} (CUDA_VISIBLE_DEVICES is {limit!r})"


def choose_device(name: str, gpu: int | None, local_rank: int, own_gpus: int | None = None) -> torch.device:
    """Choose the device that `--device` and `--gpu` mean.

    Without `--gpu`, a process takes the GPU whose number is `local_rank`. A process that sees only GPUs of its own
    takes the first of them: such a process sees one GPU, or as many as the launcher gives each process.

    Args:
        name: "auto", "cpu" or "cuda".
        gpu: The number of the GPU, counted from 0 among the visible ones, or None.
        local_rank: The number of this process on its machine.
        own_gpus: How many GPUs the launcher gives each process, where it says so.

    Returns:
        The device.

    Raises:
        UserError: There is no such GPU.
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
    """The processes of a run, the rank of this process among them, and the device of this process.

    Attributes:
        rank: The number of this process, counted from 0.
        size: The number of processes.
        device: The device that this process computes on.
        how: How the processes came together, for log lines.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu", control=None, how: str = "alone"
    ):
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.how = how
        self._control = control
        self.watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes the files."""
        return self.rank == 0

    def __str__(self) -> str:
        """The device and the processes, for log lines: cpu, 2 processes (torchrun, gloo)."""
        return f"{self.device.type}, {self.size} process{'' if self.size == 1 else 'es'} ({self.how})"

    def gather(self, value: Any) -> list[Any]:
        """Return a picklable value of every process, in rank order, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._reach(lambda: dist.all_gather_object(values, value, group=self._control))
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every process."""
        if self.size == 1:
            return value
        box = [value]
        self._reach(lambda: dist.broadcast_object_list(box, src=0, group=self._control))
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on at least one process."""
        return bool(self.most(int(flag)))

    def most(self, number: int) -> int:
        """Return the largest of the numbers of all processes, on every process. The message has four bytes."""
        if self.size == 1:
            return number
        value = torch.tensor([number], dtype=torch.int32)
        self._reach(lambda: dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control))
        return int(value.item())

    def go_on(self, error: Exception | None, what: str) -> int:
        """Ask between two steps whether all processes go on. One message of four bytes carries errors and signals.

        Args:
            error: The error of this process, if there is one.
            what: What the process did where the error happened, for the message of the others.

        Returns:
            The number of the signal that asked some process to stop, the same on all processes; 0 if none did.

        Raises:
            PeerError: Another process has an error. A process with an error raises that error.
        """
        if isinstance(error, Stopped):  # on account of a signal, which says it all
            error = None
        number = self.most(signals.asked() if error is None else _FAILED)
        if number < _FAILED:
            return number
        texts = self.gather(None if error is None else one_line(error))
        if self.watch is not None:
            self.watch.agreed()
        if error is not None:
            raise error
        raise self._peer_error(what, {rank: text for rank, text in enumerate(texts) if text is not None})

    def stop_if_asked(self, where: str) -> None:
        """Raise Stopped on all processes if a signal asked one of them to stop, where nothing has to be written."""
        number = self.most(signals.asked())
        if number:
            raise Stopped(f"{signals.name(number)} {where}")

    def mean(self, values: list[float]) -> list[float]:
        """Return the means over the processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        self._reach(lambda: dist.all_reduce(total, group=self._control))
        return (total / self.size).tolist()

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Leave this block on all processes or on none.

        An error on one process raises PeerError on the others, so that no process waits for one that has given up.
        Stopped on one process is Stopped on all. The block must not communicate: after an error before the first
        message, the other processes would wait for that message.

        Args:
            what: What the block does, for the messages of the other processes.

        Raises:
            PeerError: The block failed on another process.
            LostPeer: Another process is gone.
            Stopped: A signal asked a process to stop.
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
        own = None if error is None else (isinstance(error, Stopped), one_line(error))
        errors = [(rank, *e) for rank, e in enumerate(self.gather(own)) if e is not None]
        if self.watch is not None and errors:
            self.watch.agreed()
        if error is not None and not isinstance(error, Stopped):
            raise error
        failed = {rank: text for rank, stopped, text in errors if not stopped}
        if failed:
            raise self._peer_error(what, failed)
        if errors:
            raise Stopped(errors[0][2])

    def _peer_error(self, what: str, errors: Mapping[int, str]) -> PeerError:
        """The error of the processes without an error of their own, of which the first one tells people.

        Args:
            what: What the processes of the errors did.
            errors: The errors by rank.
        """
        rank = min(errors)
        first = next((r for r in range(self.size) if r not in errors), rank)
        return PeerError(f"{what} failed on process {rank}: {errors[rank]}", quiet=self.rank != first)

    def _reach(self, call: Callable[[], Any]) -> None:
        """Call a function that communicates with other processes. LostPeer is raised where one of them is gone."""
        try:
            call()
        except RuntimeError as e:
            raise self._lost() or e from e

    def _lost(self) -> LostPeer | None:
        """Return the error that names a process that is gone; None where none is known to be gone."""
        loss = None if self.watch is None else self.watch.find_loss()
        return None if loss is None else LostPeer(self.watch.line(), quiet=not self.watch.tells())

    def leave(self, error: BaseException | None) -> LostPeer | None:
        """Sign off from the other processes.

        Args:
            error: Why this process leaves, if it does not leave at the end of its work.

        Returns:
            The error to be raised in the place of `error`, where `error` only follows from the loss of another process.
        """
        if self.watch is None:
            return None
        known = error is None or isinstance(error, Stopped | PeerError)
        lost = None if known or isinstance(error, UserError) else self._lost()
        self.watch.leave(None if known or lost is not None else one_line(error))
        return lost

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
    """Raise UserError on all processes where two of them would use the same GPU, which nccl cannot."""
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


def init_world(options: DeviceOptions, env: Mapping[str, str] = os.environ) -> World:
    """Choose the device, find the other processes and meet them. A single process starts no process group.

    Args:
        options: The flags about the device and the processes.
        env: The environment variables.

    Returns:
        The processes, with the rank and the device of this one.

    Raises:
        UserError: The device does not exist, or the processes cannot meet.
    """
    launch = detect_launch(options, env)
    device = choose_device(options.device, options.gpu, launch.local_rank, launch.own_gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1:
        return World(device=device)
    timeout = datetime.timedelta(minutes=options.dist_timeout)
    backend = options.dist_backend if device.type == "cuda" else "gloo"
    prepare_to_meet()
    try:
        with signals.leaving_at_once("before the processes had met"):
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
    watch = Watch(launch.rank, launch.size, world.gather, _hub(launch.url, env))
    if watch.works:
        world.watch = watch
    elif world.is_main:
        logger.warning("no process can reach process 0 a second time: a process that dies is noticed late")
    if backend == "nccl":
        try:
            refuse_shared_gpus(world)
        except UserError:
            world.leave(None)
            shutdown()
            raise
    return world


def prepare_to_meet() -> None:
    """Make sure that the process group which is about to begin really ends before Python exits.

    gloo's threads end with the last reference to the group. A thread that asks for Python's lock while Python exits
    crashes the process ("terminate called without an active exception").
    """
    # Functions of these modules have the group of all processes as a default argument, and keep a group that is there
    # when the modules are imported. PyTorch's compiler imports some of them at its first use.
    import torch.distributed.optim  # noqa: F401  (imports torch.distributed.nn too)

    atexit.unregister(_let_go)
    atexit.register(_let_go)


def _let_go() -> None:
    """Free the process group, to which DistributedDataParallel refers in circles, and the frames of an error."""
    for name in ("last_exc", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
    gc.collect()


def _hub(url: str, env: Mapping[str, str]) -> str:
    """Return the host or address of process 0, where the processes met; "" where `url` does not say it."""
    if url == "env://":
        return env.get("MASTER_ADDR", "")
    return url.removeprefix("tcp://").rpartition(":")[0].strip("[]") if url.startswith("tcp://") else ""


def shutdown(lost: bool = False) -> None:
    """Leave the process group, if there is one.

    Args:
        lost: Whether a process is gone; nccl would wait for it.
    """
    if dist.is_available() and dist.is_initialized() and not (lost and dist.get_backend() == "nccl"):
        dist.destroy_process_group()
