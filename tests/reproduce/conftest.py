"""A small demo dataset, and a scale that shrinks every recipe to it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from avion.data.demo import DemoSize, ensure_demo_dataset
from avion.reproduce.recipe import RECIPES
from tests.data.demo_case import SMALL

# Two pairs of verbs, one scene of five questions.
_SIZE = DemoSize(train_takes=2, val_takes=1, takes_per_video=2, labels=2, egoschema_scenes=1)
_MODEL = {
    "img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "text_width": 32, "text_heads": 2, "text_layers": 1,
}  # fmt: skip
_QUICK = {"epochs": 1, "eval-freq": 1, "batch-size": 4, "workers": 0, "print-freq": 1}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> SimpleNamespace:
    """`scale`: recipes/scales/demo.yaml, smaller still, its data named file by file; `data`: where that lies."""
    root = tmp_path_factory.mktemp("reproduce")
    data = ensure_demo_dataset(root / "demo", size=_SIZE, workers=1)
    retrieval = {"val-metadata": data.val_csv, "relevancy-path": data.relevancy}
    actions = {"train-metadata": data.action_train_csv, "val-metadata": data.action_validation_csv}
    flags = {
        "main_pretrain.py": _QUICK
        | retrieval
        | {
            "dataset": "ego4d",
            "root": data.train_videos,
            "root-val": data.val_videos,
            "train-metadata": data.train_pickle,
            "model-args": _MODEL,
            "context-length": 12,
            "project-embed-dim": 16,
        },
        "main_finetune_retrieval.py": _QUICK
        | retrieval
        | {
            "dataset": "ek100_mir",
            "root": data.ek100_videos,
            "train-metadata": data.train_csv,
            "clip-length": 6,
            "train-relevancy-path": data.train_relevancy,
        },
        "main_finetune_classification.py": _QUICK
        | actions
        | {
            "dataset": "ek100_cls",
            "root": data.ek100_videos,
            "clip-length": 6,
            "warmup-epochs": 0,
        },
        "main_egoschema.py": {
            "dataset": "egoschema",
            "root": data.egoschema_videos,
            "questions": data.egoschema_questions,
            "answers": data.egoschema_answers,
            "workers": 0,
        },
        "main_zeroshot.py": {"workers": 0},  # a process for each of ten benchmarks would spend its time on imports
    }
    scale = yaml.safe_load((RECIPES / "scales/demo.yaml").read_text())
    for entry_point, changes in flags.items():
        changes = {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
        # Not `merged`: a flag without a value has to stay, it takes the recipe's out.
        scale[entry_point]["flags"] = _over(scale[entry_point]["flags"], changes)
    path = root / "scale/demo.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(scale))
    return SimpleNamespace(scale=str(path), data=data)


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A demo dataset with enough clips of other actions for questions of five answers."""
    return ensure_demo_dataset(tmp_path_factory.mktemp("questions") / "demo", size=SMALL, workers=1)


def _over(first: dict, second: dict) -> dict:
    both = {k: _over(first[k], v) for k, v in second.items() if isinstance(v, dict) and isinstance(first.get(k), dict)}
    return {**first, **second, **both}
