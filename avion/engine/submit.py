"""Submits an entry point as a SLURM job, through submitit (an optional package).

submitit starts one process per GPU under srun, where the processes find each other (`avion.engine.peers`). A signal has
the same effect as in a job of the sbatch files (`slurm/common.sh`): the processes end with status 75, and the job is
requeued and resumes from the checkpoint.
"""

import contextlib
import importlib
import os
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from avion.elsewhere import program_elsewhere
from avion.errors import UserError
from avion.numbers import COUNT, COUNT_OR_OFF, PROCESSES, whole
from avion.remote import is_remote
from avion.resources import SLURM, checkout, resources

from .args import Options, flag, other_default, parse
from .options import (
    EgoSchemaOptions,
    FinetuneClassificationOptions,
    FinetuneRetrievalOptions,
    PretrainOptions,
    ZeroShotOptions,
)
from .options.shared import PluginOptions
from .peers import meeting_variables
from .signals import STOPPED

ENTRY_POINTS = {
    "main_pretrain.py": PretrainOptions,
    "main_finetune_retrieval.py": FinetuneRetrievalOptions,
    "main_finetune_classification.py": FinetuneClassificationOptions,
    "main_egoschema.py": EgoSchemaOptions,
    "main_zeroshot.py": ZeroShotOptions,
}
_LOCAL_REQUEUE = 144  # on this status submitit's local executor starts the processes again


@dataclass(frozen=True)
class SubmitOptions(Options):
    """The options of a job. AVION's launchers have some of these names too."""

    TITLE: ClassVar[str] = "job"

    ngpus: int = flag(8, "GPUs per node; each of them gets a process", whole(0, 1024))
    nodes: int = flag(1, "number of nodes", PROCESSES)
    tasks_per_node: int = flag(0, "processes per node, on CPUs (--ngpus 0); 0: one per GPU", whole(0, 65536))
    timeout: int = flag(
        1440, "time limit in minutes; a job that reaches it is requeued and goes on", COUNT, metavar="MIN"
    )
    cpus_per_task: int = flag(10, "CPUs per process", PROCESSES)
    mem: str = flag("", "memory per node, such as 240G; unset: the default of the cluster", metavar="SIZE")
    partition: str = flag("", "partition of the cluster")
    account: str = flag("", "account that is charged")
    qos: str = flag("", "quality of service")
    constraint: str = flag("", "features that nodes must have")
    use_volta32: bool = flag(False, "add volta32gb to --constraint", names=["--use_volta32"], off="")
    comment: str = flag("", "comment for the scheduler")
    dependency: str = flag("", "jobs to wait for, in the words of sbatch, such as afterok:1234", metavar="KIND:JOB")
    job_dir: str = flag(
        "",
        "folder of submitit's files and of the output of the processes, on a disk that all nodes see "
        "[OUTPUT_DIR/slurm]",
        names=["--job_dir"],
        metavar="DIR",
    )
    signal_delay: int = flag(
        120, "seconds before the time limit at which the checkpoint is asked for", whole(0, 65535), metavar="S"
    )
    max_requeues: int = flag(50, "how often the job may be requeued", COUNT_OR_OFF)
    cluster: str = flag(
        "slurm",
        "where the job runs; local: in processes on this machine, to try the command out",
        choices=["slurm", "local"],
    )
    plugins: list[str] = other_default(
        PluginOptions, "plugins", [], "modules, or paths of .py files, that the job imports first, and this program too"
    )
    dry_run: bool = flag(False, "show what would be submitted, and submit nothing", off="")

    @property
    def processes(self) -> int:
        """The number of processes per node."""
        return self.tasks_per_node or self.ngpus

    def check_job(self) -> None:
        """Refuse a job without processes, and a job that would be asked to stop before it starts.

        Raises:
            UserError: The job makes no sense.
        """
        if self.processes < 1:
            raise UserError("--ngpus 0: at least 1 is required; without GPUs give --tasks-per-node")
        if self.cluster == "local" and self.nodes > 1:
            raise UserError(f"--nodes {self.nodes}: --cluster local has only one")
        if self.signal_delay >= 60 * self.timeout:
            raise UserError(f"--signal-delay {self.signal_delay}: the time limit is {60 * self.timeout} s (--timeout)")


class EntryPointJob:
    """The function that every process of the job calls: the `main` of the entry point, in submitit's environment."""

    def __init__(self, entry_point: str, words: Sequence[str]):
        self.entry_point, self.words = entry_point, list(words)

    def __call__(self) -> None:
        local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        if local:
            _set_variables_of_torchrun()
        # The programs lie on the floor above this one.
        program = Path(__file__).parents[1] / "commands" / self.entry_point.removeprefix("main_")
        status = runpy.run_path(str(program))["main"](self.words)
        if local and status == STOPPED:
            status = _LOCAL_REQUEUE
        if status:
            sys.exit(status)


def entry_point_of(name: str) -> str:
    """Return the key of ENTRY_POINTS of an entry point.

    Args:
        name: The file of the entry point, with or without a folder, or its command: main_egoschema.py, egoschema.

    Returns:
        The name of the file.

    Raises:
        UserError: There is no such entry point.
    """
    file = Path(name).name
    if file not in ENTRY_POINTS:
        file = f"main_{name.replace('-', '_')}.py"
    if file not in ENTRY_POINTS:
        if elsewhere := program_elsewhere(Path(name).name):
            raise UserError(f"{name}: {elsewhere}")
        commands = [command_of(entry_point) for entry_point in ENTRY_POINTS]
        raise UserError(f"{name}: no such entry point; there are {', '.join([*ENTRY_POINTS, *commands])}")
    return file


def command_of(entry_point: str) -> str:
    """Return the word after `avion` that runs an entry point: main_finetune_retrieval.py is finetune-retrieval."""
    return entry_point.removeprefix("main_").removesuffix(".py").replace("_", "-")


def program_words(entry_point: str, words: Sequence[str], processes: int = 1, nodes: int = 1) -> list[str]:
    """Return the command that runs an entry point, as a user types it.

    Args:
        entry_point: One of ENTRY_POINTS.
        words: The flags of the entry point.
        processes: The number of processes; torchrun starts them where there is more than one.
        nodes: The number of nodes that share the processes evenly. The same command is started on each; HOST stands for
            the first of them.

    Returns:
        The words: with the file of the clone that this package is in, or with the command `avion`.
    """
    root = checkout()
    launcher = [] if processes == 1 else ["torchrun", *_meeting(nodes), f"--nproc_per_node={processes // nodes}"]
    if root is not None:
        return [*(launcher or ["python"]), os.path.relpath(root / entry_point), *words]
    start = [*launcher, "-m", "avion"] if launcher else ["avion"]
    return [*start, command_of(entry_point), *words]


def _meeting(nodes: int) -> list[str]:
    if nodes == 1:
        return ["--standalone"]
    return [f"--nnodes={nodes}", "--rdzv_backend=c10d", "--rdzv_id=1", "--rdzv_endpoint=HOST:29500"]


def _set_variables_of_torchrun() -> None:
    """Set the variables by which the processes of submitit's local executor find each other."""
    names = {"RANK": "GLOBALID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "NTASKS"}
    os.environ.update({name: os.environ["SUBMITIT_LOCAL_" + source] for name, source in names.items()})
    os.environ.update(meeting_variables(int(os.environ["SUBMITIT_LOCAL_JOB_ID"])))


def submit(entry_point: str, words: Sequence[str], options: SubmitOptions) -> str:
    """Send `python {entry_point} {words}` to SLURM. With `dry_run` the job is only printed.

    Args:
        entry_point: One of ENTRY_POINTS.
        words: The flags of the entry point.
        options: What the job asks for.

    Returns:
        The id of the job; empty with `dry_run`.

    Raises:
        UserError: The parser of the entry point refuses the flags, the options make no sense, submitit is missing, or
            SLURM refuses the job.
    """
    entry_point = entry_point_of(entry_point)
    words = [*(["--import", *options.plugins] if options.plugins else []), *words]
    run = parse(ENTRY_POINTS[entry_point], words, entry_point, "")
    options.check_job()
    if is_remote(run.output_dir) and not options.job_dir:
        raise UserError(
            f"--output-dir {run.output_dir}: is an address; name a folder for the job's own files: --job-dir"
        )
    folder = Path(options.job_dir or Path(run.output_dir) / "slurm").absolute()
    parameters = _parameters(entry_point, options)
    if options.dry_run:
        started = ["srun", f"--nodes={options.nodes}", f"--ntasks-per-node={options.processes}"]
        print(shlex.join([*started, *program_words(entry_point, words)]))
        print(f"  {'job_dir':<28} {folder}", *(f"  {k:<28} {v}" for k, v in parameters.items()), sep="\n")
        return ""
    submitit = _submitit()
    try:
        with _environment_of_jobs():
            executor = submitit.AutoExecutor(folder=folder, cluster=options.cluster)
            executor.update_parameters(**parameters)
            return str(executor.submit(EntryPointJob(entry_point, words)).job_id)
    except (RuntimeError, OSError, submitit.core.utils.FailedSubmissionError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"the job could not be submitted: {reason[-300:]}") from e


@contextlib.contextmanager
def _environment_of_jobs() -> Iterator[None]:
    """Set the variables that a job inherits: where this package is, and the signal by which submitit's local executor
    announces the time limit. For SLURM, `_parameters` sets the signal.
    """
    before, root = dict(os.environ), checkout()
    os.environ.update(SUBMITIT_PREEMPT_SIGNAL="USR1")
    if root is not None:  # an installed package is found without a path
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _parameters(entry_point: str, options: SubmitOptions) -> dict[str, Any]:
    """Return the options under the names of submitit. The cluster decides options that are not set."""
    common = resources(SLURM) / "common.sh"
    constraint = "&".join(filter(None, [options.constraint, "volta32gb" if options.use_volta32 else ""]))
    named = {
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "comment": options.comment,
        "constraint": constraint,
        "dependency": options.dependency,
        "mem": options.mem,
    }
    return {
        "name": Path(entry_point).stem.removeprefix("main_"),
        "nodes": options.nodes,
        "tasks_per_node": options.processes,
        "gpus_per_node": options.ngpus,
        "cpus_per_task": options.cpus_per_task,
        "timeout_min": options.timeout,
        "stderr_to_stdout": True,
        **{f"slurm_{name}": value for name, value in named.items() if value},
        "slurm_additional_parameters": {"requeue": True, "signal": f"USR1@{options.signal_delay}"},
        "slurm_setup": [f"export MAX_REQUEUES={options.max_requeues} SRUN_CPUS_PER_TASK={options.cpus_per_task}"],
        "slurm_srun_args": ["--wait=120"],
        "slurm_teardown": ["status=$?", f"source {shlex.quote(str(common))}", 'requeue_or_exit "$status"'],
    }


def _submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError as e:
        raise UserError(f"submitit is not installed ({e}); install it with: pip install submitit") from e
