"""`--model-args`: read with the flags, before any file is opened; one word on flags that set the same field."""

import pytest
import yaml

import main_pretrain
from avion.engine.args import parse
from avion.engine.options import EgoSchemaOptions, FinetuneRetrievalOptions, PretrainOptions
from avion.engine.options.model_args import behaviour, parse_model_args, sizes
from avion.errors import UserError
from avion.models import create_model
from avion.models.registry import model_config
from tests.engine.test_numbers import opened, status_of  # noqa: F401

VIM = ["--model", "TIMEMAMBA_VITB16", "--model-args"]


def read(*words, config=PretrainOptions):
    return parse(config, list(words), "main_pretrain.py", "")


def test_words_become_values():
    words = ["temperature_init=1e-3", "depth=6", "dt-rank=none", "act_layer=quick_gelu", "gated_time=true"]
    assert parse_model_args(words) == {
        "temperature_init": 0.001,
        "depth": 6,
        "dt_rank": None,
        "act_layer": "quick_gelu",
        "gated_time": True,
    }


@pytest.mark.parametrize(
    "word, message",
    [
        ("name=x", "name is not a field that can be changed; --model chooses the model"),
        ("tower=joint", "tower is not a field that can be changed"),
        ("drop_path_rate=abc", "found 'abc', expected a number from 0 to below 1"),
        ("mlp_ratio=.inf", "found '.inf', expected a number above 0, up to 64"),
        ("temperature_init=0", "found '0', expected a number from 1e-06 to 100"),
        ("scan_backend=5", "found '5', expected one of auto, "),
        ("depth=2.5", "found '2.5', expected a whole number from 1 to 1024"),
        ("dept=2", "unknown field 'dept'; did you mean depth"),
        ("depth", "expected FIELD=VALUE"),
        ("depth=", "expected FIELD=VALUE"),
        ("num_heads=5", "embed_dim=768 must be a multiple of num_heads=5"),
        ("gated_time=true", "gated_time=True would have no effect"),
        ("context_length=2", "is --context-length, which is a whole number from 3"),
        ("project_embed_dim=0", "found '0', expected a whole number from 1"),
    ],
)
def test_a_mistake_is_one_line_and_no_file_is_opened(word, message, capsys, opened):  # noqa: F811
    assert status_of(main_pretrain.main, [*VIM, word]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err
    assert not [path for path in opened if "datasets" in path]


def test_a_file_names_its_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model-args: {temperature_init: 1e-3, mlp_ratio: .5}\n")
    assert yaml.safe_load(path.read_text())["model-args"]["temperature_init"] == "1e-3"  # a text, to YAML
    assert behaviour(read("--config", str(path)))["temperature_init"] == 0.001


@pytest.mark.parametrize(
    "flag, value, word",
    [
        ("--clip-length", 8, "num_frames=8"),
        ("--drop-path-rate", 0.25, "drop_path_rate=2.5e-1"),
        ("--patch-dropout", 0.5, "patch_dropout=.5"),
        ("--project-embed-dim", 64, "project_embed_dim=64"),
        ("--context-length", 32, "context_length=32"),
        ("--vocab-size", 1000, "vocab_size=1000"),
        ("--scan-backend", "torch", "scan_backend=torch"),
        ("--grad-checkpointing", True, "grad_checkpointing=true"),
        ("--use-fast-conv1", True, "use_fast_conv1=true"),
        ("--use-flash-attn", True, "use_flash_attn=true"),
        ("--freeze-temperature", True, "freeze_temperature=true"),
    ],
)
def test_a_field_that_is_a_flag_is_that_flag(flag, value, word):
    words = [flag] if value is True else [flag, str(value)]
    by_flag, by_word, by_both = read(*VIM[:2], *words), read(*VIM, word), read(*VIM, word, *words)
    name = flag[2:].replace("-", "_")
    for args in (by_flag, by_word, by_both):
        assert getattr(args, name) == value and args.was_given(name)
        fields = {**sizes(args), "num_frames": args.clip_length, **behaviour(args)}
        assert fields[word.split("=")[0]] == value


@pytest.mark.parametrize(
    "words",
    [
        ["num_frames=8", "--clip-length", "4"], ["drop_path_rate=.1", "--drop-path-rate", "0"],
        ["scan_backend=torch", "--scan-backend", "auto"], ["grad_checkpointing=false", "--grad-checkpointing"],
        ["use_flash_attn=null", "--use-flash-attn"], ["context_length=12", "--context-length", "77"],
    ],
)  # fmt: skip
def test_two_values_of_one_field_are_one_line(words):
    with pytest.raises(UserError, match="both set it; give one of them") as error:
        read(*VIM, *words)
    assert "--model-args " + words[0].split("=")[0] in str(error.value) and words[1] in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_field_twice():
    assert parse_model_args(["depth=2", "depth=2"]) == {"depth": 2}
    with pytest.raises(UserError, match="depth is given twice, as 2 and as 3"):
        parse_model_args(["depth=2", "depth=3"])


def test_the_model_is_built_with_it():
    words = ["img_size=32", "embed_dim=32", "depth=1", "num_heads=2", "text_width=32", "text_heads=2", "text_layers=1"]
    args = read(*VIM, *words, "temperature_init=1e-2", "num_frames=2", "project_embed_dim=16", "context_length=12")
    model = create_model(args.model, **sizes(args), num_frames=args.clip_length, **behaviour(args))
    assert model.config.temperature_init == 0.01 and model.config.num_frames == args.clip_length == 2
    assert model.logit_scale.item() == pytest.approx(4.60517, abs=1e-4)  # ln 100


def test_programs_without_the_flag_keep_the_field_in_model_args():
    args = read("--model-args", "num_frames=16", config=EgoSchemaOptions)
    assert behaviour(args)["num_frames"] == 16
    args = read("--model-args", "project_embed_dim=16", config=FinetuneRetrievalOptions)
    assert sizes(args) == {} and behaviour(args)["project_embed_dim"] == 16


def test_a_checkpoints_sizes_are_not_measured_by_the_default_model(tmp_path):
    """Without --model they are those of the checkpoint, which is not read here."""
    assert 768 % 5 and model_config("CLIP_VITB16").embed_dim == 768
    assert read("--resume", "a.pt", "--model-args", "num_heads=5").model_args == ["num_heads=5"]
    (tmp_path / "checkpoint.pt").touch()
    assert read("--output-dir", str(tmp_path), "--model-args", "num_heads=5").model_args == ["num_heads=5"]
