"""What docs/compatibility.md says: the tests that it names exist, and what no other test holds."""

import ast
import re
from dataclasses import MISSING, fields

import pytest

from avion.commands import pretrain as main_pretrain
from avion.engine.args import parse
from avion.engine.options import FinetuneClassificationOptions
from avion.engine.submit import SubmitOptions, entry_point_of
from avion.errors import UserError
from avion.models import create_model
from avion.models.registry import resolve_name
from avion.weights import load_pretrained
from tests.layering import ROOT, project_sources
from tests.pages import PAGES

NAMED = sorted({n for page in PAGES for n in re.findall(r"\btests/[\w/]+\.py(?:::\w+)?", page.read_text("utf-8"))})
ABSOLUTE = re.compile(r"(?<![\w.}:/~*)])/(?:home|mnt|data|scratch|work|nfs|root|users|checkpoints?|gpfs)\b", re.I)

# AVION's flags of its fine-tuning on actions, and their defaults.
AVION_ACTIONS = {
    "dataset": "ek100_cls", "num_crops": 1, "num_clips": 1, "clip_length": 16, "clip_stride": 2,
    "use_multi_epochs_loader": False, "drop_path_rate": 0.1, "dropout_rate": 0.5, "num_classes": 3806,
    "pretrain_model": None, "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": [], "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5, "mixup_mode": "batch", "smoothing": 0.1, "epochs": 100, "warmup_epochs": 2,
    "batch_size": 32, "optimizer": "sgd", "lr": 3e-3, "lr_start": 1e-6, "lr_end": 1e-5, "wd": 4e-5, "eval_freq": 5,
    "pickle_filename": None, "video_chunk_length": 15, "norm_style": "openai", "fused_decode_crop": False,
    "decode_threads": 1, "grad_checkpointing": False, "use_fast_conv1": False, "patch_dropout": 0.0, "resume": "",
    "use_zero": False, "start_epoch": 0, "update_freq": 1, "betas": [0.9, 0.999], "eps": 1e-8, "disable_amp": False,
    "grad_clip_norm": None, "print_freq": 10, "workers": 8, "evaluate": False, "world_size": 1, "rank": 0,
    "local_rank": 0, "dist_url": "env://", "dist_backend": "nccl", "seed": 0, "gpu": None, "output_dir": "./",
}  # fmt: skip


def test_the_page_names_tests():
    assert len(NAMED) > 40


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_the_docs_name_exists(name):
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert not function or function in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("name, default", AVION_ACTIONS.items())
def test_avions_flags_of_action_recognition(name, default):
    (field,) = (f for f in fields(FinetuneClassificationOptions) if f.name == name)
    assert (field.default_factory() if field.default is MISSING else field.default) == default


@pytest.mark.parametrize(
    "name",
    "CLIP_ViViM_tiny CLIP_ViViM_small CLIP_VITT16 CLIP_VITS16 CLIP_TimeSformerT16 CLIP_TimeSformerL14".split(),
)
def test_upstreams_models_that_are_not_here(name):
    with pytest.raises(UserError, match=f"unknown model '{name}'"):
        create_model(name)


@pytest.mark.parametrize("name", ["CLIP_ViViM_tiny", "CLIP_VITT16", "CLIP_TimeSformerL14", "VIDEOMAE_VITB16"])
def test_the_error_of_such_a_model_says_where_it_is(name):
    with pytest.raises(UserError, match=r"github\.com/\S+ has it; docs/compatibility.md"):
        create_model(name)


def test_deits_weights_are_not_here(capsys):
    where = r"--pretrain-zoo deit: DeiT's weights .* are not here; github\.com/OpenGVLab/video-mamba-suite has it"
    with pytest.raises(UserError, match=where):
        load_pretrained(create_model("TIMEMAMBA_VITT16", embed_dim=16, depth=1, num_heads=2), "deit")
    assert main_pretrain.main(["--pretrain-zoo", "deit"]) == 2
    assert re.search(where, capsys.readouterr().err)
    assert main_pretrain.main(["--pretrain-zoo", "clip"]) == 2
    assert "invalid choice: 'clip'" in capsys.readouterr().err


def test_what_else_is_not_here_is_answered_with_where_to_go():
    with pytest.raises(UserError, match=r"unknown flag --nodelist: sbatch .*--nodelist=NODES slurm/pretrain.sbatch"):
        parse(SubmitOptions, ["--nodelist", "gpu01"], "slurm/submit.py", "")
    for script in ("main_videomae_pretrain.py", "scripts/main_videomae_finetune.py"):
        with pytest.raises(UserError, match="VideoMAE is not here; github.com/zhaoyue-zephyrus/AVION"):
            entry_point_of(script)
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    for name in ("ViViM", "CLIP_VITT16", "CLIP_VITS16", "DeiT", "--pretrain-zoo deit", "VideoMAE", "--nodelist"):
        assert name in page


def test_the_models_that_the_readme_names_are_registered():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:TIMEMAMBA|TIMESFORMER|LAVILA|CLIP)_[A-Za-z0-9_]*[A-Z0-9]\w*", text))
    assert len(names) >= 1 and all(resolve_name(name) for name in names)


def test_no_paths_of_anybodys_machine():
    """Code, recipes and launchers name no folder from where a machine's disks begin."""
    assert ABSOLUTE.search('root = "/home/me/videos"') and not ABSOLUTE.search("datasets/data and https://host/data")
    files = [*(ROOT / "slurm").glob("*.*"), *(ROOT / "recipes").rglob("*.yaml"), ROOT / "Makefile"]
    texts = project_sources() | {str(path): path.read_text(encoding="utf-8") for path in files}
    lines = [(name, line.strip()) for name, text in texts.items() for line in text.splitlines()]
    assert [(name, line) for name, line in lines if ABSOLUTE.search(line)] == []
