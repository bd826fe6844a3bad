"""Action recognition from end to end: real files, real processes, files for the server read by another program."""

import argparse
import dataclasses
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune_classification
from avion.engine.args import parse
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs
from avion.engine.options import FinetuneClassificationOptions
from avion.engine.precision import Precision
from avion.engine.run import train_or_evaluate
from avion.engine.tasks.finetune_classification import FinetuneClassification
from avion.errors import UserError
from avion.weights import Checkpoint, classifier_from_checkpoint
from tests.engine.actions import ACTIONS, TINY, VAL, csv_text, pretrained
from tests.engine.test_pretrain import EXACT, assert_same_weights, interrupt_after, lines
from tests.processes import next_meeting, run_processes
from tests.weights import upstream_files

ROOT = Path(__file__).resolve().parents[2]
# Without mixing and dropout a step depends on its global batch alone.
PLAIN = "--mixup 0 --cutmix 0 --dropout-rate 0 --drop-path-rate 0".split()


def options(words):
    return parse(FinetuneClassificationOptions, [str(w) for w in words], "main_finetune_classification.py", "")


def train(flags, output, *more):
    train_or_evaluate(FinetuneClassification, options([*flags, "--output-dir", output, *more]))
    return torch.load(output / "checkpoint.pt", weights_only=False)


def evaluate(flags, checkpoint, *more):
    """`--evaluate` in this process: its figures."""
    return train_or_evaluate(FinetuneClassification, options([*flags, "--evaluate", "--resume", checkpoint, *more]))


def without(flags, *names):
    """The flags but for those of these names and their values."""
    gone = {i + k for i, word in enumerate(flags) if word in names for k in (0, 1)}
    return [word for i, word in enumerate(flags) if i not in gone]


def _run_all(rank, size, jobs):
    found = []
    for words in jobs:
        found.append(train_or_evaluate(FinetuneClassification, options(words)))
        next_meeting()
    return found


@pytest.fixture(scope="module")
def trained(tiny_actions, tmp_path_factory):
    """A finished run: its folder."""
    folder = tmp_path_factory.mktemp("trained")
    subsets = [
        word
        for name in ("tail_verbs", "tail_nouns", "unseen_participants")
        for word in (f"--{name.replace('_', '-')}", tiny_actions.root / f"{name.removesuffix('_participants')}.csv")
    ]
    train(tiny_actions.flags, folder, *subsets)
    return folder


class TestRun:
    def test_files_and_figures(self, trained):
        assert {p.name for p in trained.iterdir()} == {
            "checkpoint.pt",
            "checkpoint_previous.pt",
            "checkpoint_best.pt",
            "log.txt",
            "eval_log.txt",
            "steps.txt",
            "train.log",
        }
        epochs, evaluations = (lines(trained / name) for name in ("log.txt", "eval_log.txt"))
        assert len(epochs) == len(evaluations) == 2
        for row, evaluation in zip(epochs, evaluations, strict=True):
            assert {"train_loss", "train_acc1", "train_lr", "train_grad_norm"} <= row.keys()
            for kind in ("verb", "noun", "action"):
                for name in (f"{kind}_top1", f"{kind}_top5", f"{kind}_mean_class", f"unseen_{kind}_top1"):
                    assert row["test_" + name] == evaluation[name] and 0 <= evaluation[name] <= 1
            assert (evaluation["clips"], evaluation["unreadable"], evaluation["unseen_clips"]) == (7, 0, 4)
            # Verbs 3 and 96; noun 1; clips of either.
            assert [evaluation[f"tail_{k}_clips"] for k in ("verb", "noun", "action")] == [2, 2, 4]

    def test_the_checkpoint_says_what_it_is(self, trained):
        checkpoint = torch.load(trained / "checkpoint.pt", weights_only=False)
        assert checkpoint["classifier"] == {"num_classes": 6, "dropout": 0.5, "actions": ACTIONS}
        assert checkpoint["model_config"]["name"] == checkpoint["args"].model == "TIMEMAMBA_VITT16"
        assert checkpoint["model_config"]["num_frames"] == 4 and checkpoint["args"].num_classes == 6
        assert not any(name.startswith("textual") or "image_projection" in name for name in checkpoint["state_dict"])
        best = max(row["action_top1"] for row in lines(trained / "eval_log.txt"))
        assert checkpoint["best_acc1"] == best
        model = classifier_from_checkpoint(trained / "checkpoint.pt")
        assert model.actions == tuple(ACTIONS) and model.fc_cls.out_features == 6

    def test_learning_rates_follow_the_global_batch(self, trained, tiny_actions, tmp_path):
        log = (trained / "train.log").read_text()
        assert "learning rates x global batch 4 / 128: 0.015625 (--lr 0.5), from 3.125e-08, to 3.125e-07" in log
        rates = [row["train_lr"] for row in lines(trained / "log.txt")]
        assert rates[0] == pytest.approx((3.125e-08 + 0.015625) / 2)  # a linear warm-up's mean
        assert rates[1] == pytest.approx(
            np.mean([3.125e-07 + 0.5 * (0.015625 - 3.125e-07) * (1 + c) for c in (1, 0.5, -0.5)])
        )
        args = options([*tiny_actions.flags, "--batch-size", "8", "--update-freq", "3", "--output-dir", tmp_path])
        task = FinetuneClassification(args, World(rank=0, size=4))
        assert task.learning_rates() == pytest.approx([x * 8 * 3 * 4 / 128 for x in (0.5, 1e-6, 1e-5)])

    def test_evaluation_needs_the_checkpoint_and_its_clips_alone(self, trained, tiny_actions, capsys):
        recorded = lines(trained / "eval_log.txt")[-1]
        words = without(tiny_actions.flags, "--train-metadata", "--pretrain-model", "--clip-length")
        words += ["--evaluate", "--resume", str(trained / "checkpoint.pt")]
        assert main_finetune_classification.main(words) == 0
        printed = capsys.readouterr().out
        assert "7 clips" in printed
        for kind in ("verb", "noun", "action"):
            (row,) = [line.split()[1:] for line in printed.splitlines() if line.startswith(kind)]
            expected = [100 * recorded[f"{kind}_{name}"] for name in ("top1", "top5", "mean_class")]
            assert [float(x) for x in row] == pytest.approx(expected, abs=0.0051)

    def test_adamw_learns_the_training_clips(self, tiny_actions, tmp_path):
        flags = [*tiny_actions.flags, *PLAIN, "--smoothing", "0", "--scale-range", "1", "1", "--fix-lr"]
        flags += ["--optimizer", "adamw", "--lr", "0.1", "--epochs", "40", "--eval-freq", "40"]
        checkpoint = train(flags, tmp_path)
        assert "exp_avg" in checkpoint["optimizer"]["state"][0]
        epochs = lines(tmp_path / "log.txt")
        assert epochs[-1]["train_loss"] < 0.7 * epochs[0]["train_loss"]


class TestRepeatability:
    @pytest.mark.parametrize("steps", [3, 4], ids=["after an epoch", "within one"])
    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, steps, tiny_actions, tmp_path, monkeypatch):
        """Mixtures, dropout and dropped paths included."""
        flags = [*tiny_actions.flags, "--drop-path-rate", "0.3", "--save-steps", "1"]
        whole = train(flags, tmp_path / "whole")
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(Exception, match="^$"):
                train(flags, tmp_path / "cut")
        torch.rand(7), np.random.rand(3)
        resumed = train(flags, tmp_path / "cut")
        assert_same_weights(resumed, whole, **EXACT)
        a, b = (lines(tmp_path / name / "eval_log.txt")[-1] for name in ("whole", "cut"))
        assert a == b

    def test_workers_change_nothing(self, tiny_actions, tmp_path):
        alone = train(tiny_actions.flags, tmp_path / "0", "--epochs", "1")
        np.random.rand(5)
        assert_same_weights(
            train(tiny_actions.flags, tmp_path / "2", "--epochs", "1", "--workers", "2"), alone, **EXACT
        )

    def test_micro_batches_train_as_the_whole_batch(self, tiny_actions, tmp_path):
        flags = [*tiny_actions.flags, *PLAIN, "--epochs", "1"]
        whole = train(flags, tmp_path / "whole")
        cut = train(flags, tmp_path / "cut", "--batch-size", "1", "--update-freq", "4")
        assert_same_weights(cut, whole, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("processes, batch, more", [(2, 2, ["--use-zero"]), (3, 1, [])])
    def test_processes_train_and_evaluate_as_one(self, processes, batch, more, tiny_actions, tmp_path):
        """Up to rounding for the weights, to the digit for one checkpoint's figures and files."""
        flags = [*tiny_actions.flags, *PLAIN, "--epochs", "1"]
        alone = train(flags, tmp_path / "one", "--batch-size", str(batch * processes))
        views = ["--num-clips", "2", "--num-crops", "3", "--eval-batch-size", "2"]

        def files(name):
            return ["--pickle-filename", tmp_path / f"{name}.pkl", "--submission", tmp_path / f"{name}.zip"]

        checkpoint = tmp_path / "many" / "checkpoint.pt"
        words = [
            [*flags, *more, "--batch-size", str(batch), "--output-dir", tmp_path / "many"],
            [*flags, "--evaluate", "--resume", checkpoint, *views, *files(processes)],
        ]
        seen = [figures[1] for figures in run_processes(_run_all, processes, tmp_path / "processes", words)]
        many = torch.load(checkpoint, weights_only=False)
        assert_same_weights(many, alone, rtol=1e-3, atol=1e-5)
        figures = evaluate(flags, checkpoint, *views, *files(1))
        assert figures["clips"] == 7 and seen == [figures] * processes
        for suffix in ("pkl", "zip"):
            assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"{processes}.{suffix}").read_bytes()

    def test_the_best_model_is_kept_by_its_figure(self, tiny_actions, tmp_path, monkeypatch):
        figures = iter([0.2, 0.5, 0.4])
        original = FinetuneClassification.evaluate
        monkeypatch.setattr(
            FinetuneClassification, "evaluate", lambda *a: {**original(*a), "action_top1": next(figures)}
        )
        train(tiny_actions.flags, tmp_path, "--epochs", "3")
        best = torch.load(tmp_path / "checkpoint_best.pt", weights_only=False)
        assert (best["epoch"], best["best_acc1"]) == (2, 0.5)


class TestViews:
    def test_probabilities_are_averaged_over_the_views(self, trained, tiny_actions, tmp_path):
        words = ["--num-clips", "2", "--num-crops", "3", "--pickle-filename", tmp_path / "p.pkl"]
        evaluate(tiny_actions.flags, trained / "checkpoint.pt", *words)
        found = pickle.loads((tmp_path / "p.pkl").read_bytes())["action_output"]
        args = options([*tiny_actions.flags, "--evaluate", "--overwrite", *words])
        task = FinetuneClassification(args, World(), Checkpoint.open(trained / "checkpoint.pt"))
        model = task.build_model().eval()
        dataset, expected = task.val_dataset(ModelInputs.of(model.config, args)), []
        with torch.no_grad():
            for i in range(len(VAL)):
                views = dataset[i]["video"].double()
                assert views.shape[0] == 6
                expected.append(torch.softmax(model.double()(views), dim=1).mean(dim=0).numpy())
        np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)
        assert np.abs(expected[0] - torch.softmax(model(views[:1]), dim=1)[0].detach().numpy()).max() > 1e-4


def test_the_one_frame_control_sees_the_middle_frame_alone(trained, tiny_actions, monkeypatch):
    args = options([*tiny_actions.flags, "--evaluate", "--num-clips", "2"])
    task, seen = FinetuneClassification(args, World(), Checkpoint.open(trained / "checkpoint.pt")), []
    model = task.build_model()
    model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    figures = task.evaluate(model, Precision("cpu", torch.float32), one_frame=True)
    assert figures["clips"] == 7 and all(video.shape[2] == 4 for video in seen)
    assert all(torch.equal(video, video[:, :, :1].expand_as(video)) for video in seen)
    inputs = dataclasses.replace(ModelInputs.of(model.config, args), num_frames=1)
    middle = task.val_dataset(inputs)[0]["video"]
    torch.testing.assert_close(seen[0][0, :, :1], middle[0])


def read_pickle_elsewhere(path):
    """The file as a plain Python with its own pickle module sees it; it must not need numpy 2's module names."""
    assert b"numpy._core" not in path.read_bytes()
    return pickle.loads(path.read_bytes())


class TestPredictions:
    def test_pickle_and_submission(self, trained, tiny_actions, tmp_path):
        figures = evaluate(
            tiny_actions.flags,
            trained / "checkpoint.pt",
            "--pickle-filename",
            tmp_path / "new" / "p.pkl",
            "--submission",
            tmp_path / "s.zip",
            "--sls-pt",
            "4",
            "--sls-td",
            "3",
        )
        content = read_pickle_elsewhere(tmp_path / "new" / "p.pkl")
        ids = [f"{video}_v{i}" for i, (video, *_) in enumerate(VAL)]
        assert content["narration_id"].tolist() == ids and content["actions"] == ACTIONS and content["errors"] == {}
        assert content["verb_class"].tolist() == [row[3] for row in VAL]
        probs = content["action_output"]
        assert probs.shape == (7, 6) and probs.sum(axis=1) == pytest.approx([1.0] * 7, abs=1e-5)
        right = [probs[i].argmax() == ACTIONS.index(f"{v}:{n}") for i, (*_, v, n) in enumerate(VAL)]
        assert figures["action_top1"] == np.mean(right)

        with zipfile.ZipFile(tmp_path / "s.zip") as archive:
            assert archive.namelist() == ["test.json"] and archive.testzip() is None
            sent = json.loads(archive.read("test.json"))
        results = sent.pop("results")
        assert sent == {"version": "0.2", "challenge": "action_recognition", "sls_pt": 4, "sls_tl": 3, "sls_td": 3}
        assert list(results) == ids
        for row, name in zip(probs.astype(np.float64), ids, strict=True):
            for kind, count, place in (("verb", 97, 0), ("noun", 300, 1)):
                sums = dict.fromkeys(range(count), 0.0)
                for p, action in zip(row, ACTIONS, strict=True):
                    sums[int(action.split(":")[place])] += p
                assert list(results[name][kind]) == [str(c) for c in range(count)]
                assert list(results[name][kind].values()) == pytest.approx(list(sums.values()), abs=1e-6)

    def test_the_unlabelled_test_split(self, trained, tiny_actions, tmp_path, capsys):
        words = without(tiny_actions.flags, "--train-metadata", "--val-metadata")
        words += ["--val-metadata", str(tiny_actions.root / "test.csv"), "--submission", str(tmp_path / "t.zip")]
        words += ["--pickle-filename", str(tmp_path / "t.pkl")]
        assert evaluate(words, trained / "checkpoint.pt") == {"clips": 7, "unreadable": 0}
        assert "without labels: no metrics" in capsys.readouterr().out
        content = read_pickle_elsewhere(tmp_path / "t.pkl")
        assert content["verb_class"] is None and content["narration_id"][0] == "P01_01_t0"
        with zipfile.ZipFile(tmp_path / "t.zip") as archive:
            assert len(json.loads(archive.read("test.json"))["results"]) == 7

    def test_an_unreadable_clip_is_in_the_files_and_not_in_the_figures(self, trained, tiny_actions, tmp_path):
        rows = csv_text([*VAL, ("P09_01", 0.0, 1.0, 0, 2)], "v")
        (tmp_path / "val.csv").write_text(rows)
        words = [*without(tiny_actions.flags, "--val-metadata"), "--val-metadata", tmp_path / "val.csv"]
        figures = evaluate(words, trained / "checkpoint.pt", "--pickle-filename", tmp_path / "p.pkl")
        assert figures["clips"] == 7 and figures["unreadable"] == 1
        whole = evaluate(tiny_actions.flags, trained / "checkpoint.pt")
        assert figures["action_top5"] == whole["action_top5"]
        content = read_pickle_elsewhere(tmp_path / "p.pkl")
        assert "P09_01" in content["errors"]["P09_01_v7"] and (content["action_output"][7] == np.float32(1 / 6)).all()

    def test_an_action_that_is_not_in_the_list_counts_as_wrong(self, trained, tiny_actions, tmp_path, caplog):
        changed = [row if i else (*row[:3], 50, 2) for i, row in enumerate(VAL)]
        (tmp_path / "val.csv").write_text(csv_text(changed, "v"))
        words = [*without(tiny_actions.flags, "--val-metadata"), "--val-metadata", tmp_path / "val.csv"]
        figures = evaluate(words, trained / "checkpoint.pt", "--pickle-filename", tmp_path / "p.pkl")
        probs = read_pickle_elsewhere(tmp_path / "p.pkl")["action_output"]
        places = [-1 if i == 0 else ACTIONS.index(f"{v}:{n}") for i, (*_, v, n) in enumerate(changed)]
        order = np.argsort(-probs, axis=1, kind="stable")[:, :5]
        assert figures["action_top5"] == np.mean([p in row for p, row in zip(places, order, strict=True)])
        assert figures["action_top5"] < 1


class TestCheckpoints:
    @pytest.mark.parametrize(
        "fixture, name, style",
        [
            ("ID4", "TIMESFORMER_VITB16", "openai"),
            ("ID6", "TIMEMAMBA_VITB16", "openai"),
            ("VIT", "CLIP_VITB16", "openai_legacy"),
            ("LAVILA", "LAVILA_TSF_B16", "openai_legacy"),
        ],
    )
    def test_a_released_dual_encoder_is_the_start(self, fixture, name, style, tiny_actions, tmp_path):
        """Upstream's layout, inflated from 4 to 8 frames, trained and evaluated."""
        path = ROOT / "tests" / "fixtures" / f"{fixture}_checkpoint.pt"
        words = [*without(tiny_actions.flags, "--pretrain-model", "--clip-length"), "--clip-length", "8"]
        checkpoint = train(
            words,
            tmp_path,
            "--pretrain-model",
            path,
            "--norm-style",
            style,
            "--epochs",
            "1",
            "--model-args",
            "num_heads=4",
            "text_heads=4",
        )
        assert checkpoint["args"].model == name and checkpoint["model_config"]["num_frames"] == 8
        figures = evaluate(words, tmp_path / "checkpoint.pt", "--norm-style", style)
        assert figures["action_top1"] == lines(tmp_path / "eval_log.txt")[-1]["action_top1"]

    def test_an_upstream_classifier_is_evaluated(self, trained, tiny_actions, tmp_path):
        """`module.visual.*` and `module.fc_cls.*`, args without a model, no list of actions."""
        ours = torch.load(trained / "checkpoint.pt", weights_only=False)
        upstream = {
            "epoch": 99,
            "state_dict": {f"module.{k}": v for k, v in ours["state_dict"].items()},
            "best_acc1": 0.5,
            "args": argparse.Namespace(dataset="ek100_cls", clip_length=4, num_classes=6, pretrain_model="x.pt"),
        }
        torch.save(upstream, tmp_path / "up.pt")
        words = ["--model", "TIMEMAMBA_VITB16", "--model-args", "num_heads=2"]
        figures = evaluate(tiny_actions.flags, tmp_path / "up.pt", *words)
        recorded = lines(trained / "eval_log.txt")[-1]
        assert figures == {k: recorded[k] for k in figures} and figures["clips"] == 7

    @pytest.mark.parametrize("version, name", [("1.5", "TIMEMAMBA_VITB16"), ("3_pyarrow", "TIMESFORMER_VITB16")])
    def test_upstreams_own_file_brings_its_list_of_actions(self, version, name, tiny_actions, tmp_path):
        """With all of upstream's `args`, and in them the table of pandas: no list is needed from the annotations."""
        path = ROOT / "tests" / "fixtures" / f"classifier_pandas{version}.pt"
        words = [*without(tiny_actions.flags, "--train-metadata", "--clip-length"), "--train-metadata", "none.csv"]
        words += ["--model", name, "--model-args", "num_heads=4", "--pickle-filename", tmp_path / "p.pkl"]
        figures = evaluate(words, path)
        found = read_pickle_elsewhere(tmp_path / "p.pkl")
        assert found["actions"] == upstream_files.ACTIONS and found["action_output"].shape == (7, 32)
        assert figures["clips"] == 7

    def test_a_list_for_unlabelled_clips_comes_from_other_annotations(self, trained, tiny_actions, tmp_path):
        content = torch.load(trained / "checkpoint.pt", weights_only=False)
        del content["classifier"]
        torch.save(content, tmp_path / "up.pt")
        root = tiny_actions.root
        words = [*without(tiny_actions.flags, "--val-metadata"), "--val-metadata", root / "test.csv"]
        words += ["--action-metadata", root / "train.csv", root / "val.csv"]
        for name, checkpoint in (("a", trained / "checkpoint.pt"), ("b", tmp_path / "up.pt")):
            evaluate(words, checkpoint, "--pickle-filename", tmp_path / f"{name}.pkl")
        assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
        assert read_pickle_elsewhere(tmp_path / "a.pkl")["actions"] == ACTIONS
        with pytest.raises(UserError, match="its list of 6 actions is not that of the annotations"):
            evaluate([*words[:-1]], trained / "checkpoint.pt")

    def test_a_checkpoint_of_more_frames(self, trained, tiny_actions, tmp_path):
        pretrained(tmp_path / "attention.pt", "TIMESFORMER_VITT16", num_frames=2)
        words = without(tiny_actions.flags, "--pretrain-model", "--clip-length")
        args = options(
            [*words, "--clip-length", "6", "--pretrain-model", tmp_path / "attention.pt", "--output-dir", tmp_path]
        )
        model = FinetuneClassification(args, World()).build_model()
        assert model.visual.temporal_embed.shape == (1, 6, TINY["embed_dim"])
        assert ModelInputs.of(model.config, args).num_frames == 6
        assert model.config.drop_path_rate == 0.1 and model.dropout.p == 0.5

    def test_the_loss_without_mixing_is_smoothed_cross_entropy(self, tiny_actions, tmp_path):
        args = options([*tiny_actions.flags, *PLAIN, "--smoothing", "0.3", "--output-dir", tmp_path])
        task = FinetuneClassification(args, World())
        logits, labels = torch.randn(5, 6), torch.tensor([0, 5, 2, 2, 1])
        log_probs = logits.double().log_softmax(1)
        expected = -(0.7 * log_probs[range(5), labels] + 0.3 * log_probs.mean(1)).mean()
        assert task.loss(logits, {"label": labels})["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        target = torch.rand(5, 6).softmax(1)
        soft = task.loss(logits, {"target": target})
        assert soft["loss"].item() == pytest.approx(-(target.double() * log_probs).sum(1).mean().item(), rel=1e-5)
        assert soft["acc1"].item() == pytest.approx((logits.argmax(1) == target.argmax(1)).double().mean().item())
