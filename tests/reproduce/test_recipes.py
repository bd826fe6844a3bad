"""The recipes against the real parsers, the registry, and the paper's numbers typed in once more."""

import re
from pathlib import Path

import pytest
import yaml

from avion.engine.args import parse
from avion.engine.options import PretrainOptions
from avion.errors import UserError
from avion.models import list_models
from avion.reproduce.recipe import (
    ENTRY_POINTS,
    RECIPES,
    load_recipe,
    load_recipes,
    load_references,
    run_folder,
    scaled,
)

ALL = load_recipes()
BY_KEY = {recipe.key: recipe for recipe in ALL}

# V2T/T2V/Avg mAP, then nDCG; verb, noun, action top-1 and action top-5; accuracy by frames.
PAPER = """
table8_row4           29.2 21.8 25.5 30.1 27.1 28.6
table8_row5           29.8 22.2 26.0 30.6 27.5 29.0
table8_row6           30.3 22.1 26.2 30.9 27.5 29.2
table8_row7           30.7 22.8 26.8 31.3 27.8 29.5
table8_row8           30.1 21.9 26.0 30.7 27.1 28.9
table9_row4_retrieval 49.1 39.3 44.2 60.0 57.6 58.8
table9_row6_retrieval 50.3 40.3 45.3 62.4 59.2 60.9
table9_row4_actions   63.8 52.4 41.3 60.4
table9_row6_actions   66.6 53.3 42.8 63.2
table10_row4          16=33.6 128=32.9 8192=38.1
table10_row6          16=31.9 128=33.4 8192=38.7
figure5_row4          16=33.6 128=32.9 8192=38.1
figure5_row6          16=31.9 128=33.4 8192=38.7
table10_row4_uniform
table10_row6_uniform
avion                 avg_map=27.4
zeroshot_row4         ek100_mir.avg_map=25.5 ek100_mir.avg_ndcg=28.6
zeroshot_row5         ek100_mir.avg_map=26.0 ek100_mir.avg_ndcg=29.0
zeroshot_row6         ek100_mir.avg_map=26.2 ek100_mir.avg_ndcg=29.2
zeroshot_row7         ek100_mir.avg_map=26.8 ek100_mir.avg_ndcg=29.5
zeroshot_row8         ek100_mir.avg_map=26.0 ek100_mir.avg_ndcg=28.9
"""
RELEASED = """
table8_row4           29.2 21.8 25.5 30.1 27.1 28.6
table8_row5           29.8 22.2 26.0 30.6 27.5 29.0
table8_row6           30.3 22.1 26.2 30.9 27.5 29.2
table8_row7           30.7 22.8 26.8 31.3 27.8 29.5
table9_row4_retrieval 52.2 44.2 48.2 64.0 61.5 62.7
table9_row6_retrieval 52.4 45.4 48.9 65.9 63.3 64.6
table9_row4_actions   65.2 55.0 44.5 62.4
table9_row6_actions   68.5 55.8 46.1 63.8
table10_row4_uniform  16=38.52
table10_row6_uniform  16=38.70
"""
MODELS = {
    4: "TIMESFORMER_VITB16", 5: "TIMESFORMER_FROZEN_VITB16", 6: "TIMEMAMBA_VITB16", 7: "TIMEMAMBA_FROZEN_VITB16",
    8: "TIMEMAMBA_SPACETIME_VITB16", None: "CLIP_VITB16",
}  # fmt: skip
FILES = {
    "table8_row4": "clip_timesformer_vanilla_base_ego4d4m_bs512_f4.pt",
    "table8_row5": "clip_timesformer_frozen_base_ego4d4m_bs512_f4.pt",
    "table8_row6": "clip_timemamba_vanilla_base_ego4d4m_bs512_f4.pt",
    "table8_row7": "clip_timemamba_frozen_base_ego4d4m_bs512_f4.pt",
    "table8_row8": None,
    "table9_row4_retrieval": "clip_timesformer_vanilla_base_ego4d4m_bs512_f4_ft_ek100_mir_f16.pt",
    "table9_row4_actions": "clip_timesformer_vanilla_base_ego4d4m_bs512_f4_ft_ek100_cls_f16.pt",
    "table9_row6_retrieval": "clip_timemamba_vanilla_base_ego4d4m_bs512_f4_ft_ek100_mir_f16.pt",
    "table9_row6_actions": "clip_timemamba_vanilla_base_ego4d4m_bs512_f4_ft_ek100_cls_f16.pt",
}
ADAMW = {"optimizer": "adamw", "wd": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "lr": 3e-5, "grad_clip_norm": None}
PRETRAINING = ADAMW | {
    "dataset": "ego4d",
    "clip_length": 4,
    "epochs": 5,
    "fix_lr": True,
    "freeze_temperature": True,
    "local_loss": False,
    "gather_with_grad": True,
    "pretrain_zoo": "openai",
    "pretrain_path": None,
    "project_embed_dim": 256,
    "context_length": 77,
    "vocab_size": 49408,
    "scale_range": [0.5, 1.0],
    "frame_sampling": "uniform",
    "video_chunk_length": 15,
    "drop_path_rate": 0.0,
    "patch_dropout": 0.0,
    "train_metadata_aux": [],
    "eval_freq": 1,
    "train_metadata": "datasets/Ego4D/ego4d_train.pkl",
    "precision": "bf16",
    "model_args": [],
}
FINETUNING = {
    "clip_length": 16, "epochs": 100, "precision": "bf16", "grad_checkpointing": True, "norm_style": "openai",
    "lr_start": 1e-6, "lr_end": 1e-5, "fix_lr": False, "frame_sampling": "uniform", "scale_range": [0.5, 1.0],
    "patch_dropout": 0.0, "grad_clip_norm": None, "model_args": [],
}  # fmt: skip
RECIPE = {
    "zero-shot retrieval": PRETRAINING,
    "retrieval": FINETUNING | ADAMW | {
        "dataset": "ek100_mir", "warmup_epochs": 1, "margin": 0.2, "relevancy_threshold": 0.1, "drop_path_rate": 0.0,
        "relevancy_weighting": False, "gather_with_grad": True,
    },
    "actions": FINETUNING | {
        "dataset": "ek100_cls", "warmup_epochs": 2, "optimizer": "sgd", "betas": [0.9, 0.999],
        "wd": 5e-4, "lr": 3e-3, "clip_stride": 4,
        "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": [], "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
        "mixup_mode": "batch", "smoothing": 0.1, "drop_path_rate": 0.1, "dropout_rate": 0.5, "num_crops": 1,
        "num_clips": 1,
    },
    "egoschema": {
        "dataset": "egoschema", "prompt": ["Is it '{option}'"], "norm_style": "openai", "precision": "bf16",
        "exclude_overlap": False, "submit": False, "model_args": [],
    },
    "zero-shot benchmarks": {
        "dataset": ["ek100_mir", "ek100_cls", "egtea", "charades_ego", "egomcq"], "norm_style": "openai",
        "precision": "bf16", "model_args": [], "templates": [], "clip_length": None, "clip_stride": None,
        "num_clips": None, "num_crops": None, "egomcq_cosine": False, "strict_data": False,
    },
}  # fmt: skip


def figures(text):
    names = {6: "vis_map txt_map avg_map vis_ndcg txt_ndcg avg_ndcg", 4: "verb_top1 noun_top1 action_top1 action_top5"}
    found = {}
    for line in text.strip().splitlines():
        key, *values = line.split()
        if values and "=" not in values[0]:
            values = [f"{name}={value}" for name, value in zip(names[len(values)].split(), values, strict=True)]
        pairs = [value.split("=") for value in values]
        found[key] = {int(k) if k.isdigit() else k: float(v) for k, v in pairs}
    return found


def test_there_is_one_for_every_row():
    assert set(BY_KEY) == set(figures(PAPER))
    for table, figure, rows in ((8, None, [4, 5, 6, 7, 8]), (9, None, [4, 4, 6, 6]), (None, 5, [4, 6])):
        assert sorted(r.row for r in load_recipes(table=table, figure=figure)) == rows
    assert {r.row for r in load_recipes(table=10)} == {4, 6}
    assert [r.key for r in load_recipes(table="avion")] == ["avion"]
    assert {r.task for r in load_recipes(table=9, row=6)} == {"retrieval", "actions"}


@pytest.mark.parametrize("kind", ["paper", "released"])
def test_figures_are_the_papers_and_the_released_ones(kind):
    table = figures(PAPER if kind == "paper" else RELEASED)
    for key, recipe in BY_KEY.items():
        assert dict(getattr(recipe, kind)) == table.get(key, {}), key


def test_reference_rows():
    found = {(r.table, r.row, r.name): dict(r.paper) for r in load_references() if r.table != "zeroshot"}
    six = figures("x 19.4 13.9 16.6 24.1 22.0 23.1\ny 26.0 20.6 23.3 28.8 27.0 27.9\nz 49.9 40.5 45.0 60.9 57.9 59.4")
    assert found == {
        (8, 1, "EgoVLP"): six["x"],
        (8, 2, "EgoVLP, better preprocessing"): six["y"],
        (8, 3, "LaViLa"): {"avg_map": 26.0, "avg_ndcg": 28.8},
        (9, None, "EgoVLP"): six["z"],
        (10, None, "FrozenBiLM"): {10: 26.4, 90: 26.9},
        (10, None, "InternVideo"): {15: 31.6, 90: 32.0},
    }


@pytest.mark.parametrize("key", BY_KEY)
def test_flags_are_the_papers_recipe(key):
    recipe = BY_KEY[key]
    args = vars(recipe.args())
    due = dict(RECIPE[recipe.task])
    due["norm_style"] = "openai_legacy" if key == "avion" else "openai"
    if recipe.task == "zero-shot retrieval":
        due["grad_checkpointing"] = key == "avion"
        due["root"] = "datasets/Ego4D/videos_288px_15sec/"
    if recipe.task == "egoschema":
        uniform = key.endswith("_uniform")
        due["sampling"] = "uniform" if uniform else "prefix"
        sweep = [16 * 2**k for k in range(10)]
        due["frames"] = sweep if recipe.figure else [16] if uniform else [16, 128, 8192]
        assert sweep[-1] == 8192
    elif recipe.task != "zero-shot benchmarks":
        assert recipe.global_batch == args["batch_size"] * args["update_freq"] * recipe.gpus
        assert recipe.global_batch == (2048 if key == "avion" else 512)
        assert recipe.gpus == 8 and args["update_freq"] == 1
    assert {name: args[name] for name in due} == due
    assert args["model"] == recipe.model == MODELS[recipe.row]
    assert recipe.model in list_models()


@pytest.mark.parametrize("key", BY_KEY)
def test_chains_folders_and_checkpoints(key):
    recipe = BY_KEY[key]
    assert recipe.output_dir == Path("runs") / key
    assert recipe.hours > 0 and recipe.hours_on.startswith(f"{recipe.gpus} x ")
    if recipe.task == "zero-shot retrieval":
        assert recipe.starts_from is None and recipe.entry_point == "main_pretrain.py"
    else:
        parent = BY_KEY[recipe.starts_from]
        assert (parent.table, parent.row, parent.model) == (8, recipe.row, recipe.model)
        assert recipe.args().pretrain_model == f"runs/{parent.key}/checkpoint.pt"
    name = FILES.get(key, FILES.get(recipe.starts_from))
    expected = f"hf:cg1177/video-mamba-suite/{name}" if name else None
    if key == "avion":
        assert re.fullmatch(r"https://utexas\.box\.com/s/\w+", recipe.checkpoint)
    else:
        assert recipe.checkpoint == expected


@pytest.mark.parametrize("key", BY_KEY)
def test_config_takes_a_recipe_as_it_is(key):
    recipe = BY_KEY[key]
    args = parse(recipe.options, ["--config", str(recipe.path)], recipe.entry_point, "")
    assert args.values() == recipe.args().values()
    assert args.given() == {name.replace("-", "_") for name in recipe.flags}
    assert vars(parse(recipe.options, recipe.words(), recipe.entry_point, "")) == vars(args)
    for other in set(ENTRY_POINTS) - {recipe.entry_point}:
        with pytest.raises(UserError, match=rf"is a recipe of {recipe.entry_point}, not of {other}; run that one$"):
            parse(ENTRY_POINTS[other], ["--config", str(recipe.path)], other, "")


def test_the_command_line_overrides_a_recipe():
    args = parse(
        PretrainOptions, ["--epochs", "2", "--config", str(RECIPES / "table8_row6.yaml")], "main_pretrain.py", ""
    )
    assert (args.epochs, args.fix_lr, args.model) == (2, True, "TIMEMAMBA_VITB16")


def edited(tmp_path, **changes):
    """A recipe file: ID6's with some keys changed, or taken out (None)."""
    content = yaml.safe_load((RECIPES / "table8_row6.yaml").read_text())
    content.update({key.replace("_", "-"): value for key, value in changes.items()})
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


FLAGS = {"model": "TIMEMAMBA_VITB16", "output-dir": "x"}
BAD = {
    "unknown key 'toleranze': did you mean tolerance?": {"toleranze": 1},
    "unknown key 'zzz': a recipe's keys are table, figure": {"zzz": 1},
    "unknown key 'lr2': did you mean lr": {"flags": FLAGS | {"lr2": 1}},
    "unknown key 'dropout-rate'": {"flags": FLAGS | {"dropout-rate": 0.5}},
    "argument --batch-size: found 'many', expected a whole number from 1 to 1000000": {
        "flags": FLAGS | {"batch-size": "many"}
    },
    "key 'lr' has no value": {"flags": FLAGS | {"lr": None}},
    "its flags lack 'model', a text": {"flags": {"output-dir": "x"}},
    "key 'flags' of a recipe: expected a mapping of flags to values, found list": {"flags": ["--lr"]},
    "key 'flags' of a recipe: expected a mapping of flags to values, found none": {"flags": None},
    "key 'entry-point' of a recipe: expected a name, found int": {"entry_point": 3},
    "entry-point 'main.py' is not one of main_pretrain.py, ": {"entry_point": "main.py"},
    "give one of the keys table and figure": {"figure": 5},
    "key 'task' is missing": {"task": None},
    "task 'retreival' is not one of zero-shot retrieval, ": {"task": "retreival"},
    "key 'gpus': expected a whole number, found '8'": {"gpus": "8"},
    "gpus 0: at least 1 is required": {"gpus": 0},
    "key 'row': expected a whole number, found True": {"row": True},
    "paper: avg_map: a number in percent is required, found 126.2": {"paper": {"avg_map": 126.2}},
    "paper: avg_map: a number in percent is required, found 'high'": {"paper": {"avg_map": "high"}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_recipes_are_refused_in_one_line(message, tmp_path):
    path = edited(tmp_path, **BAD[message])
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert message in text and text.startswith(f"recipe {path}: ") and "\n" not in text


@pytest.mark.parametrize("content", ["- a", "a: [", "", None])
def test_what_is_no_mapping_is_refused(content, tmp_path):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"^recipe .*mine.yaml: (expected a mapping|not valid YAML|cannot be read)"):
        load_recipe(path)


def test_config_refuses_a_recipes_unknown_keys(tmp_path):
    path = edited(tmp_path, gpu=3)
    with pytest.raises(UserError, match=r"^--config .*mine.yaml: unknown key 'gpu': did you mean gpus"):
        parse(PretrainOptions, ["--config", str(path)], "main_pretrain.py", "")
    path = edited(tmp_path, entry_point=None)
    with pytest.raises(UserError, match="key 'entry-point' of a recipe: expected a name, found none"):
        parse(PretrainOptions, ["--config", str(path)], "main_pretrain.py", "")


# ---- scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", BY_KEY)
def test_the_demo_scale_fits_every_recipe(key):
    recipe = scaled(BY_KEY[key], "demo", "elsewhere", seed=7)
    args = recipe.args()
    assert recipe.gpus == 1 and recipe.scale == "demo"
    assert args.dataset == "demo" or (recipe.task == "zero-shot benchmarks" and args.demo_root == "datasets/demo")
    assert recipe.model == BY_KEY[key].model  # five rows stay five models
    assert args.output_dir == f"elsewhere/{key}/seed7"
    if recipe.task == "zero-shot retrieval":
        assert (args.model, args.seed) == (recipe.model, 7)
        gate = [word for word in args.model_args if word.startswith("time_gate_init")]
        assert "img_size=48" in args.model_args and len(gate) == (key != "avion")
    else:
        assert args.pretrain_model == f"elsewhere/{recipe.starts_from}/seed7/checkpoint.pt"
    assert recipe.paper == BY_KEY[key].paper


def test_in_full_only_folders_and_seed_change():
    recipe = scaled(BY_KEY["table9_row6_retrieval"], output_root="r", seed=3)
    changed = {"output-dir": "r/table9_row6_retrieval/seed3", "pretrain-model": "r/table8_row6/seed3/checkpoint.pt"}
    assert dict(recipe.flags) == {**BY_KEY["table9_row6_retrieval"].flags, **changed, "seed": 3}
    assert str(run_folder("x", "r", None)) == "r/x"
    assert "seed" not in scaled(BY_KEY["table8_row6"]).flags


SCALES = {
    "main_pretrain.py: {flags: {epochs: 1, lr: }}": None,
    "main_pretrian.py: {}": "unknown key 'main_pretrian.py': did you mean main_pretrain.py",
    "main_egoschema.py: {}": "says nothing of main_pretrain.py",
    "main_pretrain.py: 3": "main_pretrain.py: expected a mapping with gpus, flags, models, recipes, found int",
    "main_pretrain.py: {flagz: {}}": "unknown key 'flagz': did you mean flags",
    "main_pretrain.py: {gpus: 0}": "gpus: a number of at least 1 is required, found 0",
    "main_pretrain.py: {flags: [1]}": "flags: expected a mapping, found list",
    "main_pretrain.py: {models: {X: {gpus: 1}}}": "models: X: unknown key 'gpus'",
}


@pytest.mark.parametrize("text", SCALES)
def test_scale_files(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    if SCALES[text] is None:
        recipe = scaled(BY_KEY["table8_row6"], str(path))
        assert recipe.flags["epochs"] == 1 and "lr" not in recipe.flags and recipe.scale == "mine"
        return
    with pytest.raises(UserError, match=re.escape(SCALES[text])):
        scaled(BY_KEY["table8_row6"], str(path))


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(UserError, match="--scale tiny: no such scale; there are full, demo, or give a YAML file"):
        scaled(BY_KEY["table8_row6"], "tiny")


def test_of_three_levels_the_narrowest_wins(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "main_pretrain.py:\n  flags: {epochs: 1, lr: 1.0, model-args: {depth: 1, img_size: 32}}\n"
        "  models: {TIMEMAMBA_VITB16: {flags: {lr: 2.0, wd: 2.0, model-args: {depth: 2, img_size: }}}}\n"
        "  recipes: {table8_row6: {flags: {wd: 3.0}}}\n"
    )
    flags = scaled(BY_KEY["table8_row6"], str(path)).flags
    assert (flags["epochs"], flags["lr"], flags["wd"], flags["model-args"]) == (1, 2.0, 3.0, {"depth": 2})
    flags = scaled(BY_KEY["table8_row4"], str(path)).flags
    assert (flags["lr"], flags["wd"], flags["model-args"]) == (1.0, 0.01, {"depth": 1, "img_size": 32})


def test_references_are_checked(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in {
        "references: 3": "expected `references:` and a list of mappings",
        "references: [{task: actions, name: x, paper: {}, wor: 1}]": "row 0: unknown key 'wor'",
        "references: [{task: actions, name: x}]": "row 0: key 'paper' is missing",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(message)):
            load_references(path)
