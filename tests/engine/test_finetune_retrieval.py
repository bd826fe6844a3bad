"""Fine-tuning for retrieval from end to end: tiny data in EPIC-KITCHENS' formats, released-layout checkpoints."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune_retrieval
import main_pretrain
from avion.data.demo import DemoPaths
from avion.engine import trainer as trainer_module
from avion.engine.args import parse
from avion.engine.demo_data import on_demo_dataset
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs
from avion.engine.loader import collate
from avion.engine.options import FinetuneRetrievalOptions
from avion.engine.precision import Precision
from avion.engine.run import train_or_evaluate
from avion.engine.tasks import finetune_retrieval as task_module
from avion.engine.tasks.finetune_retrieval import FinetuneRetrieval, relevancy_file
from tests.losses.test_losses import max_margin_by_hand
from tests.processes import run_processes

FIXTURES = Path(__file__).parents[1] / "fixtures"
# What the shapes of these small towers do not show.
HEADS = ["--model-args", "num_heads=4", "text_heads=4"]
NORM_STYLES = {"ID4": "openai", "ID6": "openai", "VIT": "openai_legacy", "LAVILA": "openai_legacy"}
SGD = ["--optimizer", "sgd", "--lr", "0.02", "--epochs", "1", "--batch-size", "6", "--fix-lr"]
FP32 = Precision("cpu", torch.float32)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def pretrained(name="ID6"):
    return [
        "--pretrain-model",
        str(FIXTURES / f"{name}_checkpoint.pt"),
        "--norm-style",
        NORM_STYLES[name],
        *HEADS,
    ]


def read(*words):
    return parse(FinetuneRetrievalOptions, list(words), "main_finetune_retrieval.py", "")


def train(flags, output, *more):
    """Run the job in this process; its checkpoint."""
    train_or_evaluate(FinetuneRetrieval, read(*flags, *more, "--output-dir", str(output)))
    return torch.load(output / "checkpoint.pt", weights_only=False)


def assert_same_weights(a, b, rtol, atol):
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(
            value, b["state_dict"][name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- flags -----------------------------------------------------------------------------------

ANNOTATIONS = "datasets/EK100/epic-kitchens-100-annotations/retrieval_annotations"
AVION_DEFAULTS = {
    "dataset": "ek100_mir", "root": "datasets/EK100/EK100_256p_15sec/",
    "train_metadata": f"{ANNOTATIONS}/EPIC_100_retrieval_train.csv",
    "val_metadata": f"{ANNOTATIONS}/EPIC_100_retrieval_test.csv",
    "relevancy_path": f"{ANNOTATIONS}/relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl",
    "output_dir": "./", "video_chunk_length": 15, "clip_length": 16, "clip_stride": 4, "norm_style": "openai",
    "fused_decode_crop": False, "decode_threads": 1, "use_multi_epochs_loader": False, "model": "CLIP_VITB16",
    "grad_checkpointing": False, "use_fast_conv1": False, "patch_dropout": 0.0, "drop_path_rate": 0.0, "resume": "",
    "local_loss": False, "gather_with_grad": True, "use_zero": False, "epochs": 100, "warmup_epochs": 1,
    "start_epoch": 0, "batch_size": 16, "optimizer": "adamw", "lr": 3e-5, "lr_start": 1e-6, "lr_end": 1e-5,
    "update_freq": 1, "wd": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "eval_freq": 5, "disable_amp": False,
    "grad_clip_norm": None, "print_freq": 10, "workers": 8, "evaluate": False, "world_size": 1, "rank": 0,
    "local_rank": 0, "dist_url": "env://", "dist_backend": "nccl", "seed": 0, "gpu": None,
}  # fmt: skip


def test_avions_flags_and_their_defaults():
    args = read()
    assert {name: getattr(args, name) for name in AVION_DEFAULTS} == AVION_DEFAULTS
    assert args.relevancy_threshold == 0.1 and args.relevancy_weighting is False and args.margin == 0.2


@pytest.mark.parametrize(
    "path, train_file, test_file",
    [
        ("a_test/rel_{}.pkl", "a_test/rel_train.pkl", "a_test/rel_test.pkl"),
        ("{}/rel_{}.pkl", "train/rel_train.pkl", "test/rel_test.pkl"),
        ("a_test/rel_test.pkl", "a_test/rel_train.pkl", "a_test/rel_test.pkl"),
        ("a/test_rel_test.pkl", "a/test_rel_train.pkl", "a/test_rel_test.pkl"),
        ("a_test/rel.pkl", "a_test/caption_relevancy_EPIC_100_retrieval_train.pkl", "a_test/rel.pkl"),
    ],
)
def test_which_relevancy_file_a_split_has(path, train_file, test_file):
    assert (relevancy_file(path, "train"), relevancy_file(path, "test")) == (train_file, test_file)


# --- released-layout checkpoints --------------------------------------------------------------


@pytest.mark.parametrize("name", NORM_STYLES)
def test_a_released_checkpoint_is_fine_tuned_and_evaluated(name, mir_flags, tmp_path, capsys):
    words = [*mir_flags, *pretrained(name), "--clip-length", "16", "--use-multi-epochs-loader"]
    assert main_finetune_retrieval.main([*words, "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
    log = (tmp_path / "train.log").read_text()
    assert "frames inflated 4 -> 16" in log
    assert "12 training clips with 3.0 sentences of relevancy above 0.1 each; 2 without any are skipped" in log
    assert log.count("--use-multi-epochs-loader") == 1
    (epoch,) = lines(tmp_path / "log.txt")
    assert epoch["train_loss"] == epoch["train_max_margin_loss"] and 0 < epoch["train_loss"] < 1

    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert checkpoint["model_config"]["num_frames"] == 16
    assert checkpoint["args"].model == checkpoint["model_config"]["name"] != "CLIP_VITB16" or name == "VIT"
    before = torch.load(FIXTURES / f"{name}_checkpoint.pt", weights_only=False, map_location="cpu")["state_dict"]
    assert torch.equal(checkpoint["state_dict"]["logit_scale"], before["module.logit_scale"])
    changed = {n: v for n, v in checkpoint["state_dict"].items() if not torch.equal(v, before.get("module." + n, v))}
    assert len(changed) > 20

    capsys.readouterr()
    words = [*mir_flags[: mir_flags.index("--clip-length")], "--workers", "0", "--norm-style", NORM_STYLES[name]]
    evaluation = [*words, "--evaluate", "--batch-size", "4", "--device", "cpu"]
    checkpoint = ["--resume", str(tmp_path / "checkpoint.pt"), "--output-dir", str(tmp_path / "again")]
    assert main_finetune_retrieval.main([*evaluation, *checkpoint]) == 0
    again = lines(tmp_path / "again" / "eval_log.txt")[0]
    assert {k: again[k] for k in ("avg_map", "avg_ndcg", "clips")} == {
        k: epoch["test_" + k] for k in ("avg_map", "avg_ndcg", "clips")
    }
    assert "7 clips" in capsys.readouterr().out


@pytest.mark.parametrize("how, frames", [("--resume", 4), ("--pretrain-model", 16)])
def test_a_pretrained_checkpoint_is_evaluated_zero_shot(how, frames, mir_flags, tmp_path, monkeypatch, capsys):
    """At the frames it was trained on, or at those of fine-tuning."""
    seen = []
    original = FinetuneRetrieval.val_dataset
    monkeypatch.setattr(
        FinetuneRetrieval, "val_dataset", lambda self, inputs: seen.append(inputs.num_frames) or original(self, inputs)
    )
    words = [*mir_flags[: mir_flags.index("--clip-length")], "--evaluate", "--workers", "0", "--device", "cpu", *HEADS]
    words += [how, str(FIXTURES / "ID4_checkpoint.pt"), "--output-dir", str(tmp_path)]
    missing = ["--train-metadata", "nowhere.csv"]  # not needed for this
    assert main_finetune_retrieval.main([*words, *missing]) == 0
    assert seen == [frames] and lines(tmp_path / "eval_log.txt")[0]["clips"] == 7


def test_lavilas_checkpoint_is_measured_by_the_pretraining_job(tiny_data, tmp_path, capsys):
    words = [*tiny_data.flags, "--evaluate", "--resume", str(FIXTURES / "LAVILA_checkpoint.pt"), *HEADS]
    words += ["--workers", "0", "--device", "cpu", "--batch-size", "4", "--output-dir", str(tmp_path)]
    assert main_pretrain.main(words) == 2
    assert "--norm-style openai_legacy" in capsys.readouterr().err
    assert main_pretrain.main([*words, "--norm-style", "openai_legacy"]) == 0
    assert re.search(r"mAP( +\d+\.\d\d){3}", capsys.readouterr().out)
    assert lines(tmp_path / "eval_log.txt")[0]["clips"] == 7


# --- the loss of a step -----------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_is_the_loss_by_hand_over_its_pairs(weighted, mir_flags):
    args = read(*mir_flags, *pretrained(), *(["--relevancy-weighting"] if weighted else []))
    task = FinetuneRetrieval(args, World())
    model = task.build_model().train()
    dataset = task.train_dataset(ModelInputs.of(model.config, args))
    batch = collate([dataset[(3, i)] for i in range(12)])
    assert set(batch["relevancy"].tolist()) == {0.5, 1.0}
    video, text, _ = model(batch["video"], batch["tokens"])
    expected, video_grad, text_grad = max_margin_by_hand(
        video.detach(), text.detach(), 0.2, batch["relevancy"] if weighted else None
    )
    torch.autograd.backward([video, text], [video_grad.float(), text_grad.float()])
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    figures = task.objective.step(model, [batch], FP32, lambda x: x)
    assert float(figures["loss"]) == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(
                parameter.grad, grads[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_weighting_changes_what_is_learnt(mir_flags, tmp_path):
    plain = train([*mir_flags, *pretrained(), *SGD], tmp_path / "plain")
    weighted = train([*mir_flags, *pretrained(), *SGD], tmp_path / "weighted", "--relevancy-weighting")
    a, b = (lines(tmp_path / name / "log.txt")[0] for name in ("plain", "weighted"))
    # Every weight is 1/2 or 1, and the sentences drawn are the same.
    assert 0.5 * a["train_loss"] < b["train_loss"] < 0.95 * a["train_loss"]
    assert b["train_grad_norm"] < 0.95 * a["train_grad_norm"]
    name = "textual.text_projection"
    assert not torch.equal(plain["state_dict"][name], weighted["state_dict"][name])


# --- the same for any number of processes -----------------------------------------------------


def _train_here(rank, size, words):
    return train_or_evaluate(FinetuneRetrieval, read(*words))


CUTS = {
    "2 processes": (2, ["--batch-size", "3", "--no-gather-with-grad"]),
    "3 processes": (3, ["--batch-size", "2", "--local-loss"]),
    "3 micro-batches": (1, ["--batch-size", "2", "--update-freq", "3"]),
    "2 processes, 3 micro-batches": (2, ["--batch-size", "1", "--update-freq", "3", "--local-loss"]),
}


def test_weights_do_not_depend_on_how_a_batch_is_cut(mir_flags, tmp_path):
    """A global batch of 6, in processes and in micro-batches."""
    words = [*mir_flags, *pretrained(), *SGD, "--relevancy-weighting", "--eval-batch-size", "4"]
    whole = train(words, tmp_path / "whole")
    expected = lines(tmp_path / "whole" / "log.txt")[0]
    assert len(whole["state_dict"]) > 50
    for number, (name, (size, cut)) in enumerate(CUTS.items()):
        output = tmp_path / f"cut{number}"
        cut_words = [*words, *cut, "--output-dir", str(output)]
        if size == 1:
            _train_here(0, 1, cut_words)
        else:
            run_processes(_train_here, size, tmp_path / f"results{number}", cut_words)
        parts = torch.load(output / "checkpoint.pt", weights_only=False)
        try:
            assert_same_weights(parts, whole, rtol=1e-3, atol=1e-5)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from e
        row = lines(output / "log.txt")[0]
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4), name
        assert row["train_grad_norm"] == pytest.approx(expected["train_grad_norm"], rel=1e-3), name
        assert row["test_clips"] == 7 and len(lines(output / "log.txt")) == 1


# --- interruptions ----------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_as_an_uninterrupted_one(mir_flags, tmp_path, monkeypatch):
    words = [*mir_flags, *pretrained(), "--save-steps", "1", "--epochs", "2", "--drop-path-rate", "0.3"]
    whole = train(words, tmp_path / "whole")
    original, done = trainer_module.Trainer.optimizer_step, []

    def step(self, *args):
        if len(done) == 4:
            raise Interrupted
        done.append(1)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "optimizer_step", step)
        with pytest.raises(Interrupted):
            train(words, tmp_path / "cut")
    torch.rand(5)
    resumed = train(words, tmp_path / "cut")
    assert_same_weights(resumed, whole, rtol=0.0, atol=0.0)
    assert resumed["best_acc1"] == whole["best_acc1"] and resumed["epoch"] == 2
    assert "going on from" in (tmp_path / "cut" / "train.log").read_text()


# --- the demo dataset -------------------------------------------------------------------------


def test_the_demo_dataset_stands_in_for_every_file_that_was_not_given(mir_flags, tmp_path, monkeypatch):
    paths = DemoPaths(tmp_path / "demo")
    monkeypatch.setattr("avion.engine.demo_data.ensure_demo_dataset", lambda root: DemoPaths(Path(root)))
    given = dict(zip(mir_flags[:8:2], mir_flags[1:8:2], strict=True))
    args = read("--dataset", "demo", "--root", str(paths.root), "--val-metadata", given["--val-metadata"])
    args = on_demo_dataset(args, "ek100_videos", **task_module.DEMO_FILES)
    assert args.root == str(paths.ek100_videos) and args.val_metadata == given["--val-metadata"]
    assert args.train_metadata == str(paths.train_csv) and args.train_relevancy_path == str(paths.train_relevancy)
    assert args.relevancy_path == str(paths.relevancy)


# --- mistakes ---------------------------------------------------------------------------------


@pytest.fixture
def data(tiny_data, mir_flags, tmp_path):
    """A copy of the annotations to break."""
    shutil.copytree(tiny_data.root / "mir", tmp_path / "mir")
    return tmp_path / "mir"


@pytest.fixture
def fails(mir_flags, tiny_data, data, tmp_path, capsys):
    """Run the job on the broken copy and return its one line."""

    def run(*more: str, start=None) -> str:
        words = [w.replace(str(tiny_data.root / "mir"), str(data)) for w in mir_flags]
        start = pretrained() if start is None else start
        status = main_finetune_retrieval.main([*words, *start, "--output-dir", str(tmp_path / "run"), *more])
        captured = capsys.readouterr()
        error = [line for line in captured.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d [IW] ", line)]
        assert status == 2 and captured.out == "" and len(error) == 1, captured.err
        assert error[0].startswith("main_finetune_retrieval.py: error: ")
        return error[0]

    return run


def test_no_pretrained_model(fails):
    assert "--pretrain-model: not given" in fails(start=[])
    assert "--pretrain-model: not given" in fails(start=["--pretrain-model", ""])


@pytest.mark.parametrize(
    "flag", ["--pretrain-model", "--root", "--train-metadata", "--val-metadata", "--relevancy-path",
             "--train-relevancy-path", "--resume"],
)  # fmt: skip
def test_missing_file_or_folder(fails, flag, tmp_path):
    line = fails(flag, str(tmp_path / "nowhere"))
    assert "nowhere" in line and re.search("no such|cannot be read", line)


def test_missing_relevancy_of_the_train_split_names_the_file_that_was_looked_for(fails, data):
    (data / "train_relevancy.pkl").unlink()
    assert f"{data}/train_relevancy.pkl: no such file" in fails()


def test_a_classifier_is_no_pretrained_model(fails, tmp_path):
    checkpoint = torch.load(FIXTURES / "ID6_checkpoint.pt", weights_only=False, map_location="cpu")
    visual = {n: v for n, v in checkpoint["state_dict"].items() if ".visual." in n and "image_projection" not in n}
    head = {"module.fc_cls.weight": torch.zeros(12, 64), "module.fc_cls.bias": torch.zeros(12)}
    torch.save({**checkpoint, "state_dict": {**visual, **head}}, tmp_path / "classifier.pt")
    line = fails("--pretrain-model", str(tmp_path / "classifier.pt"))
    assert "classifier.pt" in line and "classifier" in line.split("classifier.pt", 1)[1] and "text tower" in line


def test_a_pretraining_run_is_not_gone_on_from(fails, tiny_flags, tmp_path, capsys):
    words = [*tiny_flags, "--epochs", "1", "--output-dir", str(tmp_path / "run")]
    assert main_pretrain.main(words) == 0
    capsys.readouterr()
    line = fails()  # by the checkpoint.pt in its output folder
    assert str(tmp_path / "run" / "checkpoint.pt") in line and "give it as --pretrain-model" in line


def test_another_pixel_mean(fails):
    assert "--norm-style openai_legacy" in fails("--norm-style", "openai", start=pretrained("VIT"))


@pytest.mark.parametrize("split, shape", [("train", (14, 5)), ("train", (7, 6)), ("test", (14, 6))])
def test_relevancy_of_the_wrong_shape(fails, data, split, shape):
    (data / f"{split}_relevancy.pkl").write_bytes(pickle.dumps(np.zeros(shape)))
    line = fails()
    assert f"{split}_relevancy.pkl" in line and f"{shape[0]} x {shape[1]}" in line


def test_no_clip_has_positives(fails, data):
    shape = pickle.loads((data / "train_relevancy.pkl").read_bytes()).shape
    (data / "train_relevancy.pkl").write_bytes(pickle.dumps(np.full(shape, 0.1)))
    line = fails()
    assert "train_relevancy.pkl" in line and "above 0.1" in line and "--relevancy-threshold" in line


@pytest.mark.parametrize("threshold", ["-0.1", "1", "1.5", "nan"])
def test_threshold_out_of_range(fails, threshold):
    line = fails(f"--relevancy-threshold={threshold}")
    assert f"--relevancy-threshold: found '{threshold}', expected a number from 0 to below 1" in line


@pytest.mark.parametrize("margin", ["0", "-1", "2.5", "nan"])
def test_margin_out_of_range(fails, margin):
    assert f"--margin: found '{margin}', expected a number above 0, up to 2" in fails(f"--margin={margin}")


@pytest.mark.parametrize(
    "name, column",
    [("train.csv", "start_timestamp"), ("train_sentence.csv", "narration_id"), ("test.csv", "narration")],
)
def test_csv_without_a_column(fails, data, name, column):
    header, rest = (data / name).read_text().split("\n", 1)
    (data / name).write_text(header.replace(column, "x", 1) + "\n" + rest)
    line = fails()
    assert name in line and "is missing" in line


def test_batch_larger_than_the_clips_that_are_left(fails):
    assert "larger than the dataset of 12" in fails("--batch-size", "13")
