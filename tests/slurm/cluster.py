"""A SLURM of one node on loopback, started from Debian's packages in a temporary directory, gone when the block ends.

python -m tests.slurm.cluster COMMAND ...      # runs a command in it, such as bash
"""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
# A requeued job starts at once rather than after two minutes, and is gone seconds after SIGTERM.
SchedulerParameters=requeue_delay=1,sched_interval=1,bf_interval=1
KillWait={kill_wait}
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    lacking = [name for name in _NEEDED if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} not found; on Debian: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "only root can start slurmd"
    return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class _Daemons:
    """Processes in the foreground mode of their programs, ended in reverse order."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment, self.running = folder, environment, []

    def start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "w") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.running.append(process)

    def stop(self) -> None:
        for process in reversed(self.running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


def _wait_for(what: str, ready, daemons: _Daemons, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        dead = [p.args[0] for p in daemons.running if p.poll() is not None]
        if dead or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come up ({dead or 'timeout'})\n{daemons.logs()}")
        time.sleep(0.1)


@contextlib.contextmanager
def cluster(kill_wait: int = 30) -> Iterator[dict[str, str]]:
    """A running SLURM; the environment in which its commands find it. Its jobs are cancelled at the end.

    kill_wait: seconds from SIGTERM to SIGKILL.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the name of a socket has at most 107 characters
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host, (ctld_port, d_port) = socket.gethostname().split(".")[0], _free_ports(2)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**21
    (folder / "slurm.conf").write_text(
        _CONF.format(
            host=host,
            user=getpass.getuser(),
            folder=folder,
            ctld_port=ctld_port,
            d_port=d_port,
            memory=memory,
            kill_wait=kill_wait,
        )
    )
    foreign = ("SLURM_", "SBATCH_", "SRUN_")  # of a cluster that this may run on
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}
    daemons = _Daemons(folder, environment)

    def answers(*command: str) -> bool:
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    def idle() -> bool:
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
        return state.stdout.strip() == "idle"

    try:
        files = {"key-file": key, **{f"{n}-file": folder / f"munge.{n}" for n in ("pid", "log", "seed")}}
        daemons.start(
            "munged",
            "--foreground",
            "--force",
            f"--socket={folder}/munge.socket",
            *(f"--{name}={path}" for name, path in files.items()),
        )
        _wait_for("munged", (folder / "munge.socket").exists, daemons)
        daemons.start("slurmctld", "-D", "-i")
        _wait_for("slurmctld", lambda: answers("scontrol", "ping"), daemons)
        daemons.start("slurmd", "-D")
        _wait_for("slurmd", idle, daemons)
        yield environment
    finally:
        with contextlib.suppress(OSError):
            subprocess.run(["scancel", "--signal=KILL", "--state=RUNNING"], env=environment, capture_output=True)
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, capture_output=True)
        time.sleep(1)
        daemons.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if missing():
        sys.exit(f"cluster: {missing()}")
    with cluster() as found:
        sys.exit(subprocess.run(sys.argv[1:], env=found).returncode)
