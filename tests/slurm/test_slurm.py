"""The real thing: a SLURM of one node, jobs of two tasks on the demo dataset, stopped in all ways and going on.

Needs slurmctld, slurmd, munged and root; `make test-slurm` runs it, after the other tests: it takes both CPUs.
"""

import itertools
import json
import math
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from avion.data.demo import ensure_demo_dataset
from tests.slurm.cluster import cluster, missing

ROOT = Path(__file__).resolve().parents[2]
CLIPS, BATCH, TASKS = 160, 8, 2
STEPS = CLIPS // (BATCH * TASKS)
# All others, such as SIGNALING while a signal is on its way, are passed through.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip

pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.timeout(290)]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def ended(job):
    return job["JobState"] in ENDED


class Slurm:
    """Commands of the running cluster, from the repository's root."""

    def __init__(self, environment, folder):
        self.environment, self.folder = environment, folder

    def call(self, *command, **more):
        environment = {**self.environment, "PYTHON": sys.executable, **more}
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, file, *words, options=(), **variables):
        """The id of a job of two tasks without GPUs."""
        job = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder}/%x-%j.log"]
        out = self.call("sbatch", *job, "--time=10", *options, f"slurm/{file}.sbatch", *words, **variables)
        return re.search(r"batch job (\d+)", out).group(1)

    def job(self, number):
        shown = self.call("scontrol", "show", "job", "-o", number)
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    def wait(self, number, until, seconds=150):
        """Until `until(job)`; a job that was requeued need not sit out SLURM's two minutes before it starts again.

        A few seconds it needs: slurmd refuses what was signed in the second in which it ended the job's first life.
        """
        deadline, hurried = time.monotonic() + seconds, set()
        while not until(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job}\n{self.outputs()}"
            if job["Reason"] == "BeginTime" and job["Restarts"] not in hurried:
                self.call("scontrol", "update", f"jobid={number}", "StartTime=now+3", "TimeLimit=10")
                hurried.add(job["Restarts"])
            time.sleep(0.2)
        return job

    def finish(self, number, seconds=150):
        job = self.wait(number, ended, seconds)
        assert job["JobState"] == "COMPLETED" and job["ExitCode"] == "0:0", f"{job}\n{self.outputs()}"
        return job

    def outputs(self):
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in self.folder.rglob("*.log"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    ensure_demo_dataset(ROOT / "datasets/demo")
    with cluster() as environment:
        yield Slurm(environment, tmp_path_factory.mktemp("jobs"))


def pretraining(folder, epochs):
    """Flags of a training of 10 steps an epoch, each of which is logged."""
    with open(ROOT / "datasets/demo/ego4d_train.pkl", "rb") as file:
        narrations = pickle.load(file)[:CLIPS]
    metadata = folder / "narrations.pkl"
    metadata.write_bytes(pickle.dumps(narrations))
    return [
        "--config",
        "recipes/demo_pretrain.yaml",
        "--train-metadata",
        metadata,
        "--batch-size",
        BATCH,
        "--epochs",
        epochs,
        "--eval-freq",
        epochs,
        "--print-freq",
        1,
        "--workers",
        1,
        "--device",
        "cpu",
    ]


def assert_it_went_on(output, epochs, signal, launcher):
    """Every step was done exactly once although the training was stopped, and all files are there."""
    log = (output / "train.log").read_text()
    stops = re.findall(rf"{signal} at (epoch \d+, step \d+) of {STEPS}, .* leaving with status 75", log)
    starts = re.findall(rf"going on from {output}/checkpoint.pt: (epoch \d+, step \d+)", log)
    assert stops and starts == stops, log
    assert f"2 processes ({launcher}, gloo)" in log
    steps = [(row["epoch"], row["step"]) for row in lines(output / "steps.txt")]
    assert steps == list(itertools.product(range(epochs), range(1, STEPS + 1)))
    assert [row["epoch"] for row in lines(output / "log.txt")] == list(range(epochs))
    assert [row["epoch"] for row in lines(output / "eval_log.txt")] == [epochs - 1]
    for name in ("checkpoint.pt", "checkpoint_best.pt"):
        assert torch.load(output / name, weights_only=False)["epoch"] == epochs
    return len(stops)


def trained(output, epoch):
    return lambda job: any(row["epoch"] >= epoch for row in lines(output / "steps.txt"))


@pytest.fixture(scope="module")
def requeued(slurm):
    """`scontrol requeue` in the middle of a training under srun; its folder."""
    output, epochs = slurm.folder / "requeued", 4
    job = slurm.sbatch("pretrain", *pretraining(slurm.folder, epochs), "--output-dir", output)
    slurm.wait(job, trained(output, 1))
    slurm.call("scontrol", "requeue", job)
    assert slurm.finish(job)["Restarts"] == "1"
    assert assert_it_went_on(output, epochs, "SIGTERM", "srun") == 1
    return output


def test_a_requeued_job_goes_on(requeued):
    assert (requeued / "checkpoint_best.pt").exists()


def test_a_job_at_its_time_limit_goes_on(slurm, requeued):
    """Under torchrun. The limit is a minute, the least there is, and SLURM signals up to half a minute early."""
    rate = statistics.median(row["clips_per_s"] for row in lines(requeued / "steps.txt"))
    epochs = math.ceil(55 * rate / CLIPS)  # more than fits into that minute
    output = slurm.folder / "limited"
    job = slurm.sbatch(
        "pretrain",
        *pretraining(slurm.folder, epochs),
        "--output-dir",
        output,
        options=["--time=1", "--signal=USR1@15"],
        LAUNCHER="torchrun",
    )
    restarts = int(slurm.finish(job, 240)["Restarts"])
    assert restarts >= 1 and assert_it_went_on(output, epochs, "SIGUSR1", "torchrun") == restarts
    (log,) = slurm.folder.glob(f"pretrain-{job}.log")
    assert f"requeueing job {job} (1 of at most 50 times)" in log.read_text()


def test_a_submitit_job_goes_on(slurm):
    output, epochs = slurm.folder / "submitted", 4
    options = ["--ngpus", 0, "--tasks-per-node", 2, "--cpus-per-task", 1, "--timeout", 10, "--comment", "a test"]
    words = [*pretraining(slurm.folder, epochs), "--output-dir", output]
    out = slurm.call(sys.executable, "slurm/submit.py", "main_pretrain.py", *options, "--", *words)
    job = out.removeprefix("submitted as job ").strip()
    slurm.wait(job, trained(output, 1))
    slurm.call("scancel", "--signal=USR1", job)
    assert slurm.finish(job)["Restarts"] == "1"
    assert assert_it_went_on(output, epochs, "SIGUSR1", "srun") == 1


def small_splits(folder):
    """Flags for both fine-tunings on 128 clips."""
    annotations = ROOT / "datasets/demo/epic-kitchens-100-annotations"
    retrieval = annotations / "retrieval_annotations"
    for source in (retrieval / "EPIC_100_retrieval_train.csv", annotations / "EPIC_100_train.csv"):
        (folder / source.name).write_text("".join(source.read_text().splitlines(keepends=True)[:129]))
    shutil.copy(retrieval / "EPIC_100_retrieval_train_sentence.csv", folder)
    name = "caption_relevancy_EPIC_100_retrieval_train.pkl"
    relevancy = pickle.loads((retrieval / "relevancy" / name).read_bytes())
    (folder / name).write_bytes(pickle.dumps(relevancy[:128]))
    return (
        ["--train-metadata", folder / "EPIC_100_retrieval_train.csv", "--train-relevancy-path", folder / name],
        ["--train-metadata", folder / "EPIC_100_train.csv"],
    )


def test_the_other_tasks(slurm, requeued):
    """All other tasks, from the checkpoint of the job before; a job with a mistake fails with its status."""
    jobs = {}
    retrieval, actions = small_splits(slurm.folder)
    for file, recipe, words in (
        ("finetune_retrieval", "demo_retrieval", [*retrieval, "--epochs", 1, "--warmup-epochs", 0]),
        ("finetune_classification", "demo_actions", [*actions, "--epochs", 1, "--warmup-epochs", 0]),
        ("egoschema", "demo_egoschema", ["--frames", 8]),
        ("zeroshot", "demo_zeroshot", ["--dataset", "egomcq", "egtea", "--demo-root", "datasets/demo"]),
    ):
        shared = ["--config", f"recipes/{recipe}.yaml", "--device", "cpu", "--workers", 0]
        paths = ["--pretrain-model", requeued / "checkpoint.pt", "--output-dir", slurm.folder / file]
        jobs[file] = slurm.sbatch(file, *shared, *words, *paths)
    wrong = slurm.sbatch("pretrain", "--modle", "X", options=["--ntasks-per-node=1"])
    for file, job in jobs.items():
        slurm.finish(job, 150)
        assert "2 processes (srun, gloo)" in (slurm.folder / file / "train.log").read_text()
        assert len(lines(slurm.folder / file / "eval_log.txt")) == (2 if file == "zeroshot" else 1)
    assert (slurm.folder / "finetune_retrieval/checkpoint_best.pt").exists()
    assert (slurm.folder / "finetune_classification/checkpoint_best.pt").exists()
    assert (slurm.folder / "egoschema/egoschema_8.json").exists()
    benchmarks = {row["dataset"]: row for row in lines(slurm.folder / "zeroshot/eval_log.txt")}
    assert set(benchmarks) == {"egomcq", "egtea"} and 0 <= benchmarks["egomcq"]["intra"] <= 1
    assert (slurm.folder / "zeroshot/egomcq.json").exists() and (slurm.folder / "zeroshot/egtea.npz").exists()
    failed = slurm.wait(wrong, ended)
    assert (failed["JobState"], failed["ExitCode"], failed["Restarts"]) == ("FAILED", "2:0", "0")
