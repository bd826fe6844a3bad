"""avion.targets: what is named to be written is checked before work begins."""

import argparse
import os
import re

import pytest

from avion.commands import (
    build_relevancy,
    check_data,
    convert_checkpoint,
    export_model,
    extract_features,
    files,
    index_videos,
    make_demo_data,
    make_submission,
    prepare_videos,
    reproduce,
    search_videos,
)
from avion.engine.args import build_parser
from avion.engine.options import (
    EgoSchemaOptions,
    FinetuneClassificationOptions,
    FinetuneRetrievalOptions,
    PretrainOptions,
)
from avion.engine.options.features import FeatureOptions
from avion.errors import UserError
from avion.targets import check_target, check_target_folder, remember_target


def refusal(path, **keywords):
    with pytest.raises(UserError) as caught:
        check_target(path, "--output", **keywords)
    assert str(caught.value).startswith("--output ")
    return str(caught.value)


def test_a_new_file_in_a_new_folder(tmp_path):
    check_target(tmp_path / "a" / "b" / "x.zip", "--output", suffix=".zip", make_folder=True)
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    assert "does not exist" in refusal(tmp_path / "none" / "x.zip")
    assert "ends in .zip" in refusal(tmp_path / "x.pkl", suffix=".zip")


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_text("precious")
    assert "exists already" in refusal(path) and "--overwrite" in refusal(path)
    check_target(path, "--output", overwrite=True)
    (tmp_path / "link").symlink_to(path)
    assert "exists already" in refusal(tmp_path / "link")
    assert path.read_text() == "precious"


def test_what_is_no_file_is_refused_whatever_is_asked(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path, "is a folder"),
        ("/dev/null", "is a device or a pipe"),
        (tmp_path / "pipe", "is a device or a pipe"),
        (tmp_path / ("x" * 256), "longer than the 255 bytes"),
        (tmp_path / ("é" * 128), "longer than the 255 bytes"),
        (str(tmp_path / "a\0b"), "zero byte"),
        (tmp_path / "/".join(["x" * 200] * 30), "File name too long"),
    ):
        assert says in refusal(path, overwrite=True)
    check_target(tmp_path / ("x" * 255), "--output")
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(tmp_path / "file" / "x", overwrite=True)
    assert "/proc" in refusal("/proc/none/x")


def test_what_the_run_reads_and_writes_is_never_replaced(tmp_path):
    source = tmp_path / "train.pkl"
    source.touch()
    os.link(source, tmp_path / "same.pkl")
    for path in (source, tmp_path / "same.pkl", tmp_path / "." / "train.pkl"):
        assert "is a file that is read" in refusal(path, overwrite=True, inputs=["none", "hf:a/b/c", "", str(source)])
    for name in (
        "checkpoint.pt",
        "checkpoint_best.pt",
        "log.txt",
        "eval_log.txt",
        "steps.txt",
        "train.log",
        "run.lock",
    ):
        path = tmp_path / "run" / name
        assert "the run itself writes" in refusal(path, overwrite=True, run_folder=tmp_path / "run")
        check_target(tmp_path / "else" / name, "--output", run_folder=tmp_path / "run", make_folder=True)
    check_target(tmp_path / "run" / "checkpoint_scores.pkl", "--output", run_folder=tmp_path / "run", make_folder=True)


def test_a_run_that_goes_on_replaces_what_it_wrote(tmp_path):
    run, path = tmp_path / "run", tmp_path / "scores.pkl"
    run.mkdir()
    path.write_text("first")
    assert "exists already" in refusal(path, run_folder=run, replace_own=True)
    remember_target(run, path)
    check_target(path, "--output", run_folder=run, replace_own=True)
    assert "exists already" in refusal(path, run_folder=run)
    assert "exists already" in refusal(path, run_folder=tmp_path / "other", replace_own=True)
    path.write_text("by somebody else")
    assert "exists already" in refusal(path, run_folder=run, replace_own=True)


def test_folders(tmp_path):
    check_target_folder(tmp_path / "a" / "b", "--output-dir")
    check_target_folder(tmp_path, "--output-dir")
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path / "file", "is no folder"),
        ("/dev/null", "is no folder"),
        (tmp_path / ("x" * 256), "longer than the 255"),
        (tmp_path / "file" / "x", "cannot be written"),
    ):
        with pytest.raises(UserError, match=says):
            check_target_folder(path, "--output-dir")


@pytest.mark.parametrize(
    "main, words",
    [
        (build_relevancy.main, ["c.csv", "s.csv", "--output", "s3://bucket/x.pkl"]),
        (convert_checkpoint.main, ["a.pt", "s3://bucket/x.pt"]),
        (convert_checkpoint.main, ["a.pt", "s3://bucket/folder"]),
        (files.main, ["--copy", "s3://bucket/x"]),
        (make_demo_data.main, ["--root", "s3://bucket/x"]),
        (make_submission.main, ["retrieval", "a.npy", "c.csv", "s.csv", "s3://bucket/x.zip"]),
        (prepare_videos.main, ["raw", "s3://bucket/videos"]),
        (extract_features.main, ["--checkpoint", "a.pt", "--output-dir", "s3://bucket/features"]),
        (search_videos.main, ["index", "videos", "--checkpoint", "a.pt", "--index", "s3://bucket/index"]),
    ],
)
def test_addresses_are_never_folders_here(main, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    told = capsys.readouterr().err
    assert status == 2 and "is an address" in told and told.count("\n") == 1, told
    assert not os.listdir(tmp_path)


OPTIONS = (
    PretrainOptions, FinetuneRetrievalOptions, FinetuneClassificationOptions, EgoSchemaOptions, FeatureOptions,
)  # fmt: skip
TOOLS = (
    build_relevancy, check_data, convert_checkpoint, export_model, files, index_videos, make_demo_data,
    make_submission, prepare_videos, reproduce,
)  # fmt: skip
# Flags whose help speaks of writing. A new one is checked by `check_target`, tried by tests/endurance/targets.py, and
# entered here.
WRITTEN = {"similarity_filename", "pickle_filename", "submission", "output", "target", "contact_sheet", "copy", "index"}
# Folders that a run or a tool holds under a lock, or that know their own settings; what is only read, or no name.
LOOKED_AFTER = {"output_dir", "texts", "runs", "root", "overwrite", "mark"}


def _actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
        else:
            yield action


def test_every_flag_that_names_a_file_to_write_is_known():
    parsers = [*(build_parser(options, "x", "") for options in OPTIONS), *(tool.build_parser() for tool in TOOLS)]
    found = {
        action.dest
        for parser in parsers
        for action in _actions(parser)
        if action.nargs != 0 and action.metavar not in ("N", "X")
        if re.search(r"\b(written|writes?|overwrite|replace)\b", action.help or "")
    }
    assert found <= WRITTEN | LOOKED_AFTER, found - WRITTEN - LOOKED_AFTER
    assert {"similarity_filename", "pickle_filename", "output", "target", "contact_sheet"} <= found
