"""Fixtures: the small dataset of `tiny`, and complete command lines for it."""

from types import SimpleNamespace

import pytest

from tests.engine.actions import write_actions
from tests.engine.tiny import CHUNK_S, EVAL_CLIPS, ODD_CLIPS, RUN, SCHEDULE, TRAIN_CLIPS, write_split, write_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> SimpleNamespace:
    """24 training clips, 7 evaluation clips, 6 sentences; `flags` point an entry point at them."""
    root = tmp_path_factory.mktemp("tiny_data")
    return SimpleNamespace(root=root, flags=write_tiny_data(root))


@pytest.fixture(scope="session")
def mir_flags(tiny_data) -> list[str]:
    """A complete, quick retrieval fine-tuning, but for `--pretrain-model` and `--output-dir`."""
    root = tiny_data.root / "mir"
    root.mkdir()
    write_split(root, "train", TRAIN_CLIPS + ODD_CLIPS, unspoken=(3,))
    write_split(root, "test", EVAL_CLIPS)
    flags = [
        "--root",
        tiny_data.root / "val",
        "--train-metadata",
        root / "train.csv",
        "--val-metadata",
        root / "test.csv",
        "--relevancy-path",
        root / "test_relevancy.pkl",
        "--video-chunk-length",
        CHUNK_S,
        "--clip-length",
        4,
        *SCHEDULE,
    ]
    return [str(f) for f in flags]


@pytest.fixture(scope="session")
def tiny_flags(tiny_data) -> list[str]:
    """A complete, quick training run, but for `--output-dir`."""
    return [*tiny_data.flags, *RUN]


@pytest.fixture(scope="session")
def tiny_actions(tiny_data) -> SimpleNamespace:
    """12 training and 7 evaluation clips of 6 actions; `flags` are a complete, quick run, but for `--output-dir`."""
    return write_actions(tiny_data.root / "actions", tiny_data.root / "val", CHUNK_S)
