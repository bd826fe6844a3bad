"""Video Mamba Suite evaluates EgoSchema with its pretraining script; its flags lead to the command that does it."""

import json
import shlex

import pytest

import main_egoschema
import main_pretrain
from avion.engine.args import parse
from avion.engine.options import PretrainOptions
from avion.engine.options.egoschema import EgoSchemaOptions
from avion.errors import UserError


@pytest.fixture
def answered(capsys):
    """The command that main_pretrain.py's one line of error names, as words."""

    def answered(*words):
        assert main_pretrain.main(list(map(str, words))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("main_pretrain.py: error: --")
        flags, _, command = error.strip().partition(": EgoSchema has an entry point of its own; run: ")
        words = shlex.split(command)
        assert words[:2] == ["python", "main_egoschema.py"]
        return flags.removeprefix("main_pretrain.py: error: "), words[2:]

    return answered


def test_upstreams_command_leads_to_one_that_runs(data, answered, tmp_path, monkeypatch, capsys):
    """All flags of upstream's own script for it, but for the paths."""
    monkeypatch.chdir(tmp_path)
    flags, words = answered(
        "--root",
        "s3://ego4d/videos",
        "--model",
        "CLIP_TimeMamba_like_timesformer",
        "--root-val",
        data.root / "videos",
        "--output-dir",
        "work dirs/run",
        "--video-chunk-length",
        15,
        "--clip-length",
        8,
        "--clip-stride",
        16,
        "--batch-size",
        1,
        "--disable-flash-attn",
        "--use-fast-conv1",
        "--freeze-temperature",
        "--fused-decode-crop",
        "--fix-lr",
        "--resume",
        data.checkpoint,
        "--evaluate",
        "--evaluate-task",
        "egoschema",
        "--dataset-val",
        "egoschema",
        "--val-metadata",
        data.root / "questions.json",
        "--workers",
        0,
        "--device",
        "cpu",
    )
    assert flags == "--dataset-val egoschema and --evaluate-task egoschema"
    args = parse(EgoSchemaOptions, words, "main_egoschema.py", "")
    assert args.given() == {
        "pretrain_model",
        "frames",
        "root",
        "questions",
        "model",
        "output_dir",
        "use_flash_attn",
        "use_fast_conv1",
        "workers",
        "device",
    }
    assert (args.frames, args.use_flash_attn, args.use_fast_conv1, args.sampling) == ([8], False, True, "uniform")
    words[words.index("--model=CLIP_TimeMamba_like_timesformer")] = "--model=TIMEMAMBA_VITT16"  # the case's is tiny
    assert main_egoschema.main(words) == 0, capsys.readouterr().err
    assert len(json.loads((tmp_path / "work dirs/run/egoschema_8.json").read_text())) == 7


def test_what_was_not_given_is_left_to_the_defaults(answered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert answered("--evaluate-task", "egoschema") == (
        "--evaluate-task egoschema",
        ["--pretrain-model=CHECKPOINT", "--frames", "4"],
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").touch()
    flags, words = answered("--dataset-val=egoschema", "--dataset", "demo", "--output-dir", "run", "--use-bf16")
    assert flags == "--dataset-val egoschema"
    assert set(words) == {
        "--pretrain-model=run/checkpoint.pt",
        "--frames",
        "4",
        "--dataset=demo",
        "--output-dir=run",
        "--use-bf16",
    }


def test_a_file_of_flags_is_answered_too(answered, tmp_path):
    (tmp_path / "run.yaml").write_text("evaluate-task: egoschema\nresume: a.pt\n")
    flags, words = answered("--config", tmp_path / "run.yaml", "--clip-length", 16)
    assert words == ["--pretrain-model=a.pt", "--frames", "16"]


@pytest.mark.parametrize("words", [[], ["--evaluate-task", "ek100_mir", "--dataset-val", "ek100_mir"]])
def test_retrieval_is_what_upstream_calls_it(words):
    args = parse(PretrainOptions, words, "main_pretrain.py", "")
    assert (args.dataset_val, args.evaluate_task) == ("ek100_mir", "ek100_mir")  # upstream's defaults
    assert parse(PretrainOptions, ["--evaluate-task", "mir"], "main_pretrain.py", "").evaluate_task == "mir"


@pytest.mark.parametrize("flag", ["--evaluate-task", "--dataset-val"])
def test_other_tasks_are_refused(flag):
    with pytest.raises(UserError, match="invalid choice: 'kinetics'"):
        parse(PretrainOptions, [flag, "kinetics"], "main_pretrain.py", "")
