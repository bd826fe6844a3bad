"""The main job from end to end: real files, real processes, real interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import main_pretrain
from avion.engine import trainer as trainer_module
from avion.engine.args import parse
from avion.engine.distributed import World
from avion.engine.options import PretrainOptions
from avion.engine.precision import Precision
from avion.engine.run import train_or_evaluate
from avion.engine.steps import Contrastive
from avion.engine.tasks.pretrain import Pretrain
from avion.weights import Checkpoint
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def train(flags, output, *more):
    """Run the main job in this process; its checkpoint."""
    words = [*flags, "--output-dir", str(output), *more]
    train_or_evaluate(Pretrain, parse(PretrainOptions, words, "main_pretrain.py", ""))
    return torch.load(output / "checkpoint.pt", weights_only=False)


def assert_same_weights(a, b, **tolerance):
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(value, b["state_dict"][name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDING = {"rtol": 1e-3, "atol": 1e-5}
# Adam turns gradients that are zero but for rounding (of key biases) into whole steps; SGD leaves rounding small.
SGD = ["--optimizer", "sgd", "--lr", "0.02", "--epochs", "1"]


def test_a_run_from_start_to_end(tiny_flags, tmp_path, capsys):
    assert main_pretrain.main([*tiny_flags, "--output-dir", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint.pt",
        "checkpoint_previous.pt",
        "checkpoint_best.pt",
        "log.txt",
        "eval_log.txt",
        "steps.txt",
        "train.log",
    }
    epochs, evaluations, steps = (lines(tmp_path / f) for f in ("log.txt", "eval_log.txt", "steps.txt"))
    assert [e["epoch"] for e in epochs] == [0, 1] and len(evaluations) == 2
    for row, evaluation in zip(epochs, evaluations, strict=True):
        assert {"train_loss", "train_clip_acc", "train_lr", "train_grad_norm", "train_clips_per_s"} <= row.keys()
        for name in ("vis_map", "txt_map", "avg_map", "vis_ndcg", "txt_ndcg", "avg_ndcg"):
            assert row["test_" + name] == evaluation[name] and 0 <= evaluation[name] <= 1
        assert evaluation["clips"] == 7 and evaluation["unreadable"] == 0
    assert [(s["epoch"], s["step"]) for s in steps] == [(0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (1, 6)]
    assert all(0 <= s["wait"] <= 1 and s["clips_per_s"] > 0 and s["memory_gb"] > 0 for s in steps)

    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert checkpoint["epoch"] == 2 and checkpoint["args"].model == "TIMEMAMBA_VITT16"
    assert checkpoint["best_acc1"] == max(e["avg_map"] for e in evaluations)
    assert checkpoint["preprocess"]["norm_style"] == "openai" and checkpoint["model_config"]["embed_dim"] == 32
    log = (tmp_path / "train.log").read_text()
    assert "clips/s, waiting for data" in log and "left" in log


def test_evaluation_alone_prints_the_figures_of_the_checkpoint(tiny_flags, tmp_path, capsys):
    train(tiny_flags, tmp_path, "--epochs", "1")
    recorded = lines(tmp_path / "eval_log.txt")[-1]
    capsys.readouterr()
    # The model comes from the checkpoint: none of its sizes is on this command line.
    words = [w for w in tiny_flags[:12]] + [
        "--evaluate",
        "--resume",
        str(tmp_path / "checkpoint.pt"),
        "--device",
        "cpu",
    ]
    assert main_pretrain.main([*words, "--batch-size", "4", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "7 clips" in printed
    by_name = {
        row.split()[0]: [float(x) for x in row.split()[1:]] for row in printed.splitlines() if row[:3] in ("mAP", "nDC")
    }
    for kind in ("map", "ndcg"):
        expected = [100 * recorded[f"{side}_{kind}"] for side in ("vis", "txt", "avg")]
        assert by_name["mAP" if kind == "map" else "nDCG"] == pytest.approx(expected, abs=0.0051)


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, steps):
    """Make the trainer stop in the middle of its work, as a power cut would."""
    original, done = trainer_module.Trainer.optimizer_step, []

    def step(self, *args):
        if len(done) == steps:
            raise Interrupted
        done.append(1)
        return original(self, *args)

    monkeypatch.setattr(trainer_module.Trainer, "optimizer_step", step)


@pytest.mark.parametrize("steps, save_steps", [(6, 0), (9, 2), (10, 2)], ids=["epoch", "lost a step", "lost nothing"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(steps, save_steps, tiny_flags, tmp_path, monkeypatch):
    """Weights, optimizer, schedule, data order and dropout draws all go on where they were."""
    dropping = ["--drop-path-rate", "0.3", "--patch-dropout", "0.5", "--save-steps", str(save_steps)]
    whole = train(tiny_flags, tmp_path / "whole", *dropping)
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Interrupted):
            train(tiny_flags, tmp_path / "cut", *dropping)
    # Other code drew random numbers in between, in another process even.
    torch.rand(7), np.random.rand(3)
    resumed = train(tiny_flags, tmp_path / "cut", *dropping)
    assert_same_weights(resumed, whole, **EXACT)
    assert resumed["best_acc1"] == whole["best_acc1"] and resumed["epoch"] == whole["epoch"] == 2
    a, b = (lines(tmp_path / name / "eval_log.txt")[-1] for name in ("whole", "cut"))
    assert a == b


def test_a_finished_run_has_nothing_left_to_do(tiny_flags, tmp_path):
    before = train(tiny_flags, tmp_path, "--epochs", "1")
    after = train(tiny_flags, tmp_path, "--epochs", "1")
    assert_same_weights(before, after, **EXACT)
    assert "nothing left to train" in (tmp_path / "train.log").read_text()


def test_the_best_model_is_kept_by_its_figure(tiny_flags, tmp_path, monkeypatch):
    figures = iter([0.2, 0.5, 0.4])
    original = Pretrain.evaluate
    monkeypatch.setattr(Pretrain, "evaluate", lambda *a: {**original(*a), "avg_map": next(figures)})
    train(tiny_flags, tmp_path, "--epochs", "3")
    best = torch.load(tmp_path / "checkpoint_best.pt", weights_only=False)
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (best["epoch"], best["best_acc1"]) == (2, 0.5) and (last["epoch"], last["best_acc1"]) == (3, 0.5)


@pytest.mark.parametrize(
    "flags",
    [["--update-freq", "2", "--batch-size", "2"], ["--workers", "2"], ["--workers", "1", "--eval-batch-size", "3"]],
)
def test_weights_do_not_depend_on_how_the_work_is_cut(flags, tiny_flags, tmp_path):
    whole = train(tiny_flags, tmp_path / "whole", *SGD)
    cut = train(tiny_flags, tmp_path / "cut", *SGD, *flags)
    assert_same_weights(whole, cut, **(EXACT if "--workers" in flags else ROUNDING))


def test_fused_crops_train_the_same_model_up_to_rounding(tiny_flags, tmp_path):
    plain = train(tiny_flags, tmp_path / "plain", "--epochs", "1")
    fused = train(tiny_flags, tmp_path / "fused", "--epochs", "1", "--fused-decode-crop")
    a, b = (lines(tmp_path / n / "log.txt")[0]["train_loss"] for n in ("plain", "fused"))
    assert a == pytest.approx(b, rel=0.02)
    assert plain["args"].fused_decode_crop is False and fused["args"].fused_decode_crop is True


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_learns_about_the_same(precision, tiny_flags, tmp_path):
    train(tiny_flags, tmp_path / "fp32", *SGD)
    checkpoint = train(tiny_flags, tmp_path / precision, *SGD, "--precision", precision)
    a, b = (lines(tmp_path / n / "log.txt")[0]["train_loss"] for n in ("fp32", precision))
    # fp16 finds its loss scale by skipping the first steps.
    assert a == pytest.approx(b, rel=0.02 if precision == "bf16" else 0.2)
    assert all(v.dtype is torch.float32 for v in checkpoint["state_dict"].values())
    assert bool(checkpoint["scaler"]) is (precision == "fp16")


def torchrun(words, processes, output, *, background=False):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        f"--master_port={free_port()}",
        str(ROOT / "main_pretrain.py"),
        *words,
        "--output-dir",
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if background:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("processes, batch, more", [(2, 2, ["--use-zero"]), (3, 2, ["--local-loss"])])
def test_torchrun_trains_and_evaluates_as_one_process_does(processes, batch, more, tiny_flags, tmp_path):
    """The same global batch: the same weights up to rounding, and from one checkpoint the same figures to the digit."""
    torchrun([*tiny_flags, *SGD, "--batch-size", str(batch), *more], processes, tmp_path / "many")
    alone = train(tiny_flags, tmp_path / "one", *SGD, "--batch-size", str(batch * processes))
    many = torch.load(tmp_path / "many" / "checkpoint.pt", weights_only=False)
    assert_same_weights(alone, many, **ROUNDING)
    one, several = (lines(tmp_path / n / "log.txt")[0]["train_loss"] for n in ("one", "many"))
    assert one == pytest.approx(several, rel=1e-4)

    checkpoint = ["--evaluate", "--resume", str(tmp_path / "many" / "checkpoint.pt"), "--eval-batch-size", "2"]
    torchrun([*tiny_flags, *checkpoint], processes, tmp_path / "evaluated")
    args = parse(PretrainOptions, [*tiny_flags, *checkpoint], "", "")
    task = Pretrain(args, World(), Checkpoint.open(args.resume))
    figures = task.evaluate(task.build_model(), Precision("cpu", torch.float32))
    recorded = lines(tmp_path / "evaluated" / "eval_log.txt")[0]
    assert {k: recorded[k] for k in figures} == figures


def test_processes_under_srun_find_each_other(tiny_flags, tmp_path):
    """Started as srun starts them: no launcher of ours, only SLURM's variables."""
    words = [*tiny_flags, "--epochs", "1", "--batch-size", "2", "--output-dir", str(tmp_path)]
    shared = {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "OMP_NUM_THREADS": "1",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "main_pretrain.py"), *words],
            env={**shared, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], "\n".join(outputs)
    assert "2 processes (srun, gloo)" in outputs[0]
    assert len(lines(tmp_path / "log.txt")) == 1


def test_a_killed_run_goes_on_from_a_whole_checkpoint(tiny_flags, tmp_path):
    """kill -9 of all processes while they write checkpoints after every step."""
    words = [*tiny_flags, "--batch-size", "2", "--epochs", "30", "--eval-freq", "30", "--save-steps", "1"]
    job = torchrun(words, 2, tmp_path, background=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    for child in subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(child), signal.SIGKILL)
    job.kill()
    job.wait()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    done = checkpoint["epoch"] * 6 + checkpoint["step"]
    assert done > 0
    resumed = train(tiny_flags, tmp_path, "--batch-size", "4", "--epochs", str(checkpoint["epoch"] + 1))
    assert resumed["epoch"] == checkpoint["epoch"] + 1
    assert f"going on from {tmp_path / 'checkpoint.pt'}" in (tmp_path / "train.log").read_text()


def test_a_broken_clip_is_replaced_in_training_and_left_out_of_the_figures(tiny_flags, tiny_data, tmp_path):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(tiny_data.root, root)
    (root / "train/video1.mp4/0.mp4").write_bytes(b"not a video")
    (root / "val/P01/P01_01.MP4/0.MP4").unlink()
    flags = [w.replace(str(tiny_data.root), str(root)) for w in tiny_flags]
    train(flags, tmp_path / "run", "--epochs", "1")
    row = lines(tmp_path / "run" / "log.txt")[0]
    assert row["train_replaced_clips"] > 0 and row["test_unreadable"] == 3 and row["test_clips"] == 4
    log = (tmp_path / "run" / "train.log").read_text()
    assert "video1.mp4/0.mp4" in log and "P01_01.MP4/0.MP4" in log


def test_gradients_that_are_not_finite_skip_steps_and_then_end_the_run(tiny_flags, tmp_path, monkeypatch, capsys):
    original = Contrastive.step

    def poisoned(self, model, *args):
        figures = original(self, model, *args)
        next(model.parameters()).grad.fill_(float("nan"))
        return figures

    monkeypatch.setattr(Contrastive, "step", poisoned)
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED_IN_A_ROW", 4)
    assert main_pretrain.main([*tiny_flags, "--output-dir", str(tmp_path)]) == 2
    assert "not finite in 4 steps in a row" in capsys.readouterr().err


def test_a_skipped_step_changes_nothing(tiny_flags, tmp_path, monkeypatch):
    original = Contrastive.step

    def poisoned(self, model, *args):
        figures = original(self, model, *args)
        next(model.parameters()).grad.fill_(float("nan"))
        return figures

    monkeypatch.setattr(Contrastive, "step", poisoned)
    checkpoint = train(tiny_flags, tmp_path, "--epochs", "1")
    args = parse(PretrainOptions, tiny_flags, "", "")
    torch.manual_seed(0)
    initial = Pretrain(args, World()).build_model().state_dict()
    assert_same_weights(checkpoint, {"state_dict": initial}, **EXACT)
    assert lines(tmp_path / "log.txt")[0]["train_skipped_steps"] == 6
