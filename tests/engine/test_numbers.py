"""Every number that a program takes has a type and a range, and is checked before any file is opened."""

import argparse
import dataclasses
import importlib.util
import math
import re
import sys
import typing
from pathlib import Path

import pytest

import main_egoschema
import main_finetune_classification
import main_finetune_retrieval
import main_pretrain
import main_zeroshot
from avion.engine.args import ToolParser, build_parser, flag, flag_fields, parse
from avion.engine.options import (
    EgoSchemaOptions,
    FinetuneClassificationOptions,
    FinetuneRetrievalOptions,
    PretrainOptions,
    ZeroShotOptions,
)
from avion.engine.options.features import FeatureOptions
from avion.engine.submit import SubmitOptions
from avion.numbers import Number

ROOT = Path(__file__).resolve().parents[2]
BAD = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "1.5",
    "abc",
    "",
    "1" + "0" * 30,
    "1e999",
    "9" * 5000,
    "0x10",
    "1e-3",
    "1e3",
    "1_0",
    "١",
]


def load(path):
    spec = importlib.util.spec_from_file_location("_number_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOLS = {
    path.name: importlib.import_module(f"avion.commands.{path.stem}") for path in sorted((ROOT / "tools").glob("*.py"))
}
SUBMIT = load(ROOT / "slurm/submit.py")
GENERATED = {
    "main_pretrain.py": (PretrainOptions, main_pretrain.main),
    "main_finetune_retrieval.py": (FinetuneRetrievalOptions, main_finetune_retrieval.main),
    "main_finetune_classification.py": (FinetuneClassificationOptions, main_finetune_classification.main),
    "main_egoschema.py": (EgoSchemaOptions, main_egoschema.main),
    "main_zeroshot.py": (ZeroShotOptions, main_zeroshot.main),
    "tools/extract_features.py": (FeatureOptions, TOOLS["extract_features.py"].main),
    "slurm/submit.py": (SubmitOptions, lambda words: SUBMIT.main(["main_pretrain.py", *words])),
}


def is_numeric(action):
    return isinstance(action.type, Number) or action.type in (int, float)


def numeric_flags(parser):
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [(name, flag) for name, sub in action.choices.items() for _, flag in numeric_flags(sub)]
        elif is_numeric(action):
            found.append((None, action))
    return found


def cases():
    """(program, what runs it with these words, the flag's action, words before it) for every numeric flag."""
    for name, (config, main) in GENERATED.items():
        for _, action in numeric_flags(build_parser(config, name, "")):
            yield pytest.param(main, action, [], id=f"{name} {action.option_strings[-1]}")
    for name, module in TOOLS.items():
        if not hasattr(module, "build_parser"):
            continue
        for sub, action in numeric_flags(module.build_parser()):
            yield pytest.param(
                module.main,
                action,
                [] if sub is None else [sub],
                id=f"tools/{name} {sub or ''} {action.option_strings[-1]}",
            )


CASES = list(cases())
_opened: list[str] = []
_watching = [False]


def _audit(event, arguments):
    if _watching[0] and event == "open" and isinstance(arguments[0], (str, bytes)):
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)  # cannot be taken back; idle unless _watching


@pytest.fixture
def opened():
    """The files that were opened in the test."""
    _opened.clear()
    _watching[0] = True
    yield _opened
    _watching[0] = False


def allowed(number, text, choices):
    """What `number` should say, worked out again: by Python's own conversions, and comparisons written out."""
    try:
        value = float(text) if set(text) <= set("0123456789+-.einfa") else None
    except (ValueError, OverflowError):
        return False
    if value is None or not math.isfinite(value) or (number.kind is int and ("." in text or "e-" in text)):
        return False
    if choices is not None:
        return value in choices
    inside = number.low <= value <= number.high and not (number.above and value == number.low)
    return value in number.also or (inside and not (number.below and value == number.high))


def status_of(main, words):
    try:
        return main(words)
    except SystemExit as exit:
        return exit.code


def test_every_program_is_swept():
    assert len(CASES) > 100
    swept = {case.id.split(" ")[0] for case in CASES}
    assert set(GENERATED) <= swept and {"tools/check_data.py", "tools/reproduce.py", "tools/tables_demo.py"} <= swept


def test_every_tool_says_its_numbers_in_build_parser():
    for path in (ROOT / "avion/commands").glob("*.py"):
        source = path.read_text()
        assert not re.search(r"\btype=(int|float)\b", source), path
        if re.search(r"\btype=(whole|SEED|Number)", source):
            assert hasattr(TOOLS[path.name], "build_parser"), path


@pytest.mark.parametrize("main, action, before", CASES)
def test_a_number_is_in_the_range_or_one_line(main, action, before, capsys, opened):
    number, name = action.type, action.option_strings[-1]
    assert isinstance(number, Number), f"{name}: declare the numbers that it takes"
    count = action.nargs if isinstance(action.nargs, int) else 1
    refused = 0
    for text in BAD:
        if allowed(number, text, action.choices):
            value = number(text)
            assert type(value) is number.kind and value == float(text)
            continue
        refused += 1
        words = [*before, f"{name}={text}"] if count == 1 else [*before, name, *[text] * count]
        assert status_of(main, words) == 2, text
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and name in err and "error:" in err
        if action.choices is None:
            assert number.range in err and (text[:9] in err)
        assert len(err) < 400 and "Traceback" not in err
    assert refused >= 8
    code = (".py", ".pyc", ".so")
    assert [path for path in opened if not path.endswith(code) and not path.startswith((sys.prefix, "/proc"))] == []


@pytest.mark.parametrize("name", GENERATED)
def test_every_flag_has_a_type_and_a_default_of_it(name):
    config, _ = GENERATED[name]
    hints = typing.get_type_hints(config)
    for field in flag_fields(config).values():
        hint, spec = hints[field.name], field.metadata["flag"]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        inner = [t for t in (typing.get_args(hint) or (hint,)) if t is not type(None)]
        assert len(inner) == 1 and inner[0] in (int, float, bool, str), field.name
        for value in default if isinstance(default, list) else [default]:
            optional = value is None and type(None) in typing.get_args(hint)
            assert optional or type(value) is inner[0], field.name
            if not optional and inner[0] in (int, float) and spec["choices"] is None:
                assert value in spec["within"], field.name


@pytest.mark.parametrize("annotation, default", [(int, 1), (float, 1.0), (list[int], [1]), (int | None, None)])
def test_a_number_without_a_range_is_a_mistake_of_the_program(annotation, default):
    config = dataclasses.make_dataclass("Config", [("size", annotation, flag(default, "a size"))])
    with pytest.raises(TypeError, match="size"):
        build_parser(config, "x.py", "")


def test_the_range_is_of_the_flags_type():
    config = dataclasses.make_dataclass("Config", [("size", int, flag(1, "a size", Number(float, 0, 1)))])
    with pytest.raises(TypeError, match="size"):
        build_parser(config, "x.py", "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lr-end", "1e-3"], "--lr-end 0.001: is above --lr 3e-05"),
        (["--lr", "1e-6"], "--lr-end 1e-05: is above --lr 1e-06"),
        (["--lr-start", "1e-3"], "--lr-start 0.001: is above --lr 3e-05"),
        (["--warmup-epochs", "6"], "--warmup-epochs 6: --epochs 5 end before"),
        (["--start-epoch", "5"], "--start-epoch 5: epochs are counted from 0"),
        (["--scale-range", "1", ".5"], "--scale-range 1 0.5: the smaller share comes first"),
        (["--dist-url", "tcp://host:70000"], "--dist-url tcp://host:70000: expected tcp://host:port"),
        (["--dist-url", "tcp://host"], "--dist-url tcp://host: expected tcp://host:port"),
        (["--rank", "1"], "rank 1 of 1 processes"),
        (["--scan-backend", "5"], "backend"),
        (["--lr", "-1e-3"], "--lr: found '-1e-3'"),
        (["--betas", "1", "2"], "--betas: found '1', expected a number from 0 to below 1"),
        (["--betas", "0.9", "-inf"], "--betas: found '-inf'"),
    ],
)
def test_combinations_and_words_that_cannot_be_meant(words, message, capsys):
    assert main_pretrain.main(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "1e-6", "--fix-lr"], ["--lr", "1e-6", "--evaluate"], ["--lr", "1e-6", "--lr-end", "0"],
        ["--lr-end", "3e-5"], ["--lr-start", "1", "--warmup-epochs", "0"], ["--warmup-epochs", "5"],
        ["--save-steps", "0"], ["--eval-batch-size", "0"], ["--workers", "0"], ["--video-chunk-length", "-1"],
        ["--epochs", "1e1"], ["--wd", "0"], ["--betas", "0", ".999"], ["--lr-start", "0"], ["--grad-clip-norm", "1"],
        ["--dist-url", "tcp://[::1]:29500"], ["--scale-range", ".5", ".5"],
    ],
)  # fmt: skip
def test_what_is_meant_is_taken(words):
    assert parse(PretrainOptions, words, "main_pretrain.py", "").given()


def test_classification_without_mixing_and_a_short_run_are_taken():
    words = ["--mixup", "0", "--cutmix", "0", "--epochs", "1", "--smoothing", "0", "--batch-size", "3"]
    args = parse(FinetuneClassificationOptions, words, "main_finetune_classification.py", "")
    assert (args.mixup, args.cutmix, args.warmup_epochs) == (0, 0, 2)


def test_a_tools_parser_says_one_line(capsys):
    parser = ToolParser(prog="x.py")
    parser.add_argument("--size", type=Number(float, 0, 1))
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--size", "-1e-3"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "x.py: error: argument --size: found '-1e-3', expected a number from 0 to 1 (--help says more)\n"
    )
