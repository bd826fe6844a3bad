"""Runs that train only the last blocks of their towers: all three tasks, several processes, resuming."""

import logging
import re

import pytest
import torch

from avion.engine.args import parse
from avion.engine.options import FinetuneClassificationOptions, FinetuneRetrievalOptions, PretrainOptions
from avion.engine.run import train_or_evaluate
from avion.engine.tasks.finetune_classification import FinetuneClassification
from avion.engine.tasks.finetune_retrieval import FinetuneRetrieval
from avion.engine.tasks.pretrain import Pretrain
from avion.errors import UserError
from tests.engine import quick
from tests.engine.test_finetune_retrieval import pretrained
from tests.processes import run_processes

TASKS = {
    "pretrain": (Pretrain, PretrainOptions),
    "retrieval": (FinetuneRetrieval, FinetuneRetrievalOptions),
    "actions": (FinetuneClassification, FinetuneClassificationOptions),
}
# Adam turns gradients that are zero but for rounding (of key biases) into whole steps.
SGD = ["--optimizer", "sgd", "--lr", "0.02", "--epochs", "1", "--fix-lr", "--wd", "0.5"]


def train(task, words, output):
    """Run a task in this process; its checkpoint, and the weights that it began with."""
    kind, options = TASKS[task]
    began = {}

    class Seen(kind):
        def build_model(self):
            model = super().build_model()
            began.update({name: p.detach().clone() for name, p in model.named_parameters()})
            return model

    train_or_evaluate(Seen, parse(options, [*map(str, words), "--output-dir", str(output)], f"main_{task}.py", ""))
    return torch.load(output / "checkpoint.pt", weights_only=False), began


def train_as_rank(rank, size, task, words, output):
    kind, options = TASKS[task]
    train_or_evaluate(kind, parse(options, [*map(str, words), "--output-dir", str(output)], f"main_{task}.py", ""))


def changed(checkpoint, began):
    weights = checkpoint["state_dict"]
    return {name for name, value in began.items() if not torch.equal(weights[name], value)}


@pytest.fixture
def words_of(tiny_flags, mir_flags, tiny_actions):
    return {
        "pretrain": tiny_flags,
        "retrieval": [*mir_flags, *pretrained()],
        "actions": [*tiny_actions.flags],
    }


@pytest.mark.parametrize("task", TASKS)
def test_only_what_is_not_locked_is_trained(task, words_of, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    text = [] if task == "actions" else ["--lock-text", "0"]
    words = [*words_of[task], *SGD, "--lock-video", "1", *text, "--lock-except", "gates", "--drop-path-rate", "0.2"]
    checkpoint, began = train(task, words, tmp_path / "run")
    last = max(int(n.split(".")[2]) for n in began if n.startswith("visual.blocks."))
    assert last >= 1
    wanted = rf"visual\.(blocks\.{last}\.|norm\.|image_projection)|fc_cls|textual\.text_projection|.*alpha_timeattn"
    free = {n for n in began if re.match(wanted, n)}
    moved = changed(checkpoint, began) - {"logit_scale"}
    matrices = {n for n in free if began[n].ndim > 1 and "A_" not in n}  # weight decay alone would move them
    assert matrices <= moved <= free and f"visual.blocks.{last - 1}.alpha_timeattn" in moved
    in_optimizer = sum(len(group["params"]) for group in checkpoint["optimizer"]["param_groups"])
    assert in_optimizer == len(free) + (task == "pretrain")  # the logit scale is trained there
    assert vars(checkpoint["args"])["lock_video"] == 1 and vars(checkpoint["args"])["lock_except"] == ["gates"]
    (line,) = (r.message for r in caplog.records if r.message.startswith("parameters: "))
    total, trained, frozen = (int(x.replace(",", "")) for x in re.findall(r"[\d,]*\d", line)[:3])
    assert total == trained + frozen == sum(p.numel() for p in began.values())
    assert trained == sum(began[n].numel() for n in free) + (task == "pretrain")


@pytest.mark.parametrize("task", TASKS)
def test_every_training_tells_its_parameters(task, words_of, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, began = train(task, [*words_of[task], *SGD], tmp_path / "run")
    (line,) = (r.message for r in caplog.records if r.message.startswith("parameters: "))
    count = sum(p.numel() for p in began.values())
    frozen = 1 if task == "retrieval" else 0  # the loss has no temperature
    assert line.startswith(f"parameters: {count:,} ({count - frozen:,} trained, {frozen} frozen); video tower ")


@pytest.mark.parametrize(
    "task, more",
    [
        ("pretrain", ["--lock-text", "1", "--use-zero", "--grad-checkpointing"]),
        ("pretrain", ["--lock-text", "0", "--lock-except", "norms", "--update-freq", "2"]),
        ("retrieval", ["--lock-text", "0"]),
        ("actions", ["--mixup", "0", "--cutmix", "0", "--dropout-rate", "0", "--drop-path-rate", "0"]),
    ],
)
@pytest.mark.parametrize("last", [0, 1])
def test_two_processes_train_as_one(task, more, last, words_of, tmp_path):
    words = [*words_of[task], *SGD, "--lock-video", last, *more]
    whole, began = train(task, [*words, "--batch-size", 4], tmp_path / "one")
    run_processes(train_as_rank, 2, tmp_path / "ranks", task, [*words, "--batch-size", 2], tmp_path / "two")
    parts = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=False)
    assert changed(whole, began) == changed(parts, began) != set()
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(
            parts["state_dict"][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


LOCKED = ["--lock-video", "1", "--lock-text", "1", "--lock-except", "gates"]


def contents(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=False)


def quick_words(*words):
    """`--model-args` of `quick.WORDS` with two blocks in each tower."""
    deeper = [w.replace("depth=1", "depth=2").replace("text_layers=1", "text_layers=2") for w in quick.WORDS]
    return [*deeper, "--drop-path-rate", "0.3", *words]


def run(folder, *words):
    options = parse(PretrainOptions, [*quick_words(*words), "--output-dir", str(folder)], "main_pretrain.py", "")
    return train_or_evaluate(quick.Quick, options)


def test_a_run_that_goes_on_ends_as_one_that_nothing_stopped(tmp_path):
    run(tmp_path / "whole", *LOCKED, "--fix-lr", "--epochs", "2")
    run(tmp_path / "parts", *LOCKED, "--fix-lr", "--epochs", "1")
    run(tmp_path / "parts", *LOCKED, "--fix-lr", "--epochs", "2")
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    assert whole["optimizer"]["state"].keys() == parts["optimizer"]["state"].keys()


@pytest.mark.parametrize(
    "words, flag, listed",
    [
        (["--lock-video", "0", *LOCKED[2:]], "lock-video", "--lock-video 1 -> 0"),
        (LOCKED[:2] + LOCKED[4:], "lock-text", "--lock-text 1 -> None"),
        (LOCKED[:4], "lock-except", "--lock-except gates -> nothing"),
    ],
)
def test_another_lock_is_another_run(words, flag, listed, tmp_path, caplog):
    run(tmp_path, *LOCKED, "--epochs", "1")
    with pytest.raises(UserError) as refused:
        run(tmp_path, *words, "--epochs", "2")
    assert listed in str(refused.value) and str(refused.value).endswith(f"--allow-changes {flag}")
    caplog.set_level(logging.INFO)
    run(tmp_path, *words, "--epochs", "2", "--allow-changes", flag)
    assert "other parameters are trained than before: the state of the optimizer starts anew" in caplog.text
    assert contents(tmp_path)["epoch"] == 2


def test_a_checkpoint_from_before_the_flags_had_nothing_locked(tmp_path):
    run(tmp_path, "--epochs", "1")
    old = contents(tmp_path)
    for name in ("lock_video", "lock_text", "lock_except"):
        delattr(old["args"], name)
    torch.save(old, tmp_path / "checkpoint.pt")
    run(tmp_path, "--epochs", "2")  # as before
    with pytest.raises(UserError, match="--lock-video None -> 1.*--allow-changes lock-video"):
        run(tmp_path, "--epochs", "3", "--lock-video", "1")


def test_the_temperature_may_be_frozen_on_the_way(tmp_path, caplog):
    run(tmp_path, "--epochs", "1")
    run(tmp_path, "--epochs", "2", "--freeze-temperature")
    assert "--freeze-temperature False -> True" in caplog.text
    assert "the state of the optimizer starts anew" in caplog.text
    assert contents(tmp_path)["epoch"] == 2


@pytest.mark.parametrize("task", TASKS)
def test_an_exception_from_no_lock_is_refused(task):
    with pytest.raises(UserError, match="--lock-except norms: nothing is locked; give --lock-video N") as refused:
        parse(TASKS[task][1], ["--lock-except", "norms"], "main.py", "")
    assert ("--lock-text" in str(refused.value)) == (task != "actions")


def test_more_blocks_than_there_are(tmp_path):
    with pytest.raises(UserError, match="--lock-video 3: the video tower has 2 blocks"):
        run(tmp_path, "--lock-video", "3")
