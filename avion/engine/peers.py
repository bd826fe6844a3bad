"""Finds out how the processes of a run meet: what the launcher says, hosts and ports.

Nothing in this module needs PyTorch. `avion.engine.distributed` lets the processes meet at the place that is found
here.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from avion.errors import UserError
from avion.numbers import PORT, PROCESSES, RANK, shown, whole

from .options.shared import DeviceOptions

LOCAL_HOST = "127.0.0.1"


class PeerError(UserError):
    """Another process failed. That process reports the error, and this process only leaves because of it.

    Attributes:
        quiet: Whether yet another process reports why processes like this one leave, so that this one prints nothing.
    """

    def __init__(self, text: str, quiet: bool = False):
        super().__init__(text)
        self.quiet = quiet


class LostPeer(PeerError):
    """Another process died or was stopped, and can report nothing. No message can reach all processes any more."""


@dataclass(frozen=True)
class Launch:
    """What the launcher said about a process.

    Attributes:
        rank: The number of this process, counted from 0.
        size: The number of processes.
        local_rank: The number of this process on its machine.
        url: Where the processes meet, as `torch.distributed` takes it.
        by: The name of the launcher, for log lines and errors.
        own_gpus: How many GPUs the launcher gives each process, where it says so.
    """

    rank: int
    size: int
    local_rank: int
    url: str
    by: str
    own_gpus: int | None = None


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list.

    Args:
        nodelist: The list: "gpu[03-05,9],cpu1" begins with gpu03, "rack[1-2]n[01-16]" with rack1n01.

    Returns:
        The name of the host.

    Raises:
        UserError: The list has another form.
    """
    match = re.match(r"(?:[^,\[\]\s]|\[\w[\w,-]*\])+(?=,|$)", nodelist)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST: cannot read a host name from {nodelist!r}; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match.group())


def meeting_port(job: int, step: int = 0) -> int:
    """Compute the port at which the processes of a job's step meet.

    All tasks of the step compute the same port without communication. The port lies below the ephemeral ports, and jobs
    that share a node get different ports.

    Args:
        job: The number of the job.
        step: The number of the step.

    Returns:
        The port.
    """
    return 15000 + (7 * job + step) % 15000


def meeting_variables(job: int) -> dict[str, str]:
    """Return the environment variables by which processes that share this machine meet."""
    return {"MASTER_ADDR": LOCAL_HOST, "MASTER_PORT": str(meeting_port(job))}


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


def detect_launch(options: DeviceOptions, env: Mapping[str, str] = os.environ) -> Launch:
    """Read how this process was launched: from the variables of torchrun, or else those of srun, or else from the
    flags.

    Only the variables of a launched task count. Inside an sbatch script or a salloc shell, SLURM_NTASKS is set too, but
    a plain `python` there is alone and must not wait for others.

    Args:
        options: `--rank`, `--world-size`, `--local-rank` and `--dist-url`, which count where there is no launcher.
        env: The environment variables.

    Returns:
        What the launcher said.

    Raises:
        UserError: A variable is missing or not a number in its range, or the rank does not exist.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        launch = _torchrun_launch(options, env)
    elif "SLURM_STEP_NUM_TASKS" in env and _integer(env, "SLURM_STEP_NUM_TASKS") > 1:
        launch = _srun_launch(env)
    else:
        launch = Launch(options.rank, options.world_size, options.local_rank, options.dist_url, "flags")
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


def _torchrun_launch(options: DeviceOptions, env: Mapping[str, str]) -> Launch:
    # Scripts that set RANK and WORLD_SIZE by hand under srun often forget LOCAL_RANK.
    name = next((n for n in ("LOCAL_RANK", "SLURM_LOCALID") if n in env), None)
    by_flag = name is None or (name != "LOCAL_RANK" and options.local_rank)
    local_rank = options.local_rank if by_flag else _integer(env, name)
    return Launch(_integer(env, "RANK"), _integer(env, "WORLD_SIZE"), local_rank, "env://", "torchrun")


def _srun_launch(env: Mapping[str, str]) -> Launch:
    # srun does not set MASTER_ADDR and MASTER_PORT: where they are set, somebody set them by hand.
    host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    job, step = (_integer(env, name) if name in env else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _integer(env, "MASTER_PORT") if env.get("MASTER_PORT") else meeting_port(job, step)
    return Launch(
        _integer(env, "SLURM_PROCID"),
        _integer(env, "SLURM_STEP_NUM_TASKS"),
        _integer(env, "SLURM_LOCALID"),
        f"tcp://{host}:{port}",
        "srun",
        _gpus_per_task(env.get("SLURM_GPUS_PER_TASK", "")),
    )


def _gpus_per_task(text: str) -> int | None:
    """The number in SLURM's "2" and "a100:2"; None for anything else."""
    match = re.fullmatch(r"(?:[^:,]+:)?(\d+)", text)
    return int(match[1]) if match else None
