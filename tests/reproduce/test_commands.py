"""Commands: processes and batches, released weights, more flags, quoting; what is missing for them."""

import dataclasses
import shlex
import sys

import huggingface_hub
import pytest

from avion.errors import UserError
from avion.reproduce import prerequisites
from avion.reproduce.commands import command, executable, from_released, shell_text, with_processes, with_words
from avion.reproduce.launch import Run
from avion.reproduce.plan import Request, plan
from avion.reproduce.prerequisites import missing
from avion.reproduce.recipe import RECIPES, load_recipe, scaled
from avion.reproduce.show import described, figures_text


def recipe(key, **changes):
    return load_recipe(RECIPES / f"{key}.yaml").with_flags({k.replace("_", "-"): v for k, v in changes.items()})


# ---- processes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "batch", "update_freq"),
    [(8, 64, 1), (1, 64, 8), (2, 64, 4), (4, 64, 2), (16, 32, 1), (64, 8, 1), (512, 1, 1)],
)
def test_the_global_batch_stays(count, batch, update_freq):
    args = with_processes(recipe("table8_row6"), count).args()
    assert (args.batch_size, args.update_freq) == (batch, update_freq)
    assert count * batch * update_freq == 512


@pytest.mark.parametrize("count", [3, 5, 6, 7, 9, 1024])
def test_what_does_not_divide_is_refused(count):
    with pytest.raises(UserError, match=rf"^--gpus {count}: the batch of 512 clips .* 1, 2, 4, 8, 16, 32$"):
        with_processes(recipe("table8_row6"), count)


def test_a_micro_batch_stays_within_the_recipes():
    # 2048 / 3 does not divide; 512 by 6 processes neither, 96 by 6 does: 16 each, of which 12 do not fit at once.
    small = with_processes(dataclasses.replace(recipe("table8_row6", batch_size=12), gpus=8), 6).args()
    assert (small.batch_size, small.update_freq) == (8, 2)


def test_mixup_takes_clips_in_pairs():
    args = with_processes(recipe("table9_row6_actions"), 256).args()
    assert (args.batch_size, args.update_freq) == (2, 1)
    with pytest.raises(UserError, match="among 512 processes in even parts, which mixup needs; give one of 1, 2, 4"):
        with_processes(recipe("table9_row6_actions"), 512)
    assert with_processes(recipe("table9_row6_actions", mixup=0.0, cutmix=0.0), 512).args().batch_size == 1


def test_without_a_batch_any_number_will_do():
    assert with_processes(recipe("table10_row6"), 3).flags == recipe("table10_row6").flags
    released = with_processes(from_released(recipe("table8_row6"), None), 3)
    assert released.gpus == 3 and released.args().batch_size == 64
    with pytest.raises(UserError, match="--gpus 0: at least 1 is required"):
        with_processes(recipe("table10_row6"), 0)


# ---- released weights ------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["table8_row7", "table9_row4_retrieval", "table9_row4_actions"])
def test_released_weights_are_evaluated_only(key):
    trained, released = recipe(key), from_released(recipe(key), None)
    args = released.args()
    assert args.evaluate and args.resume == trained.checkpoint and args.model == trained.model
    assert args.output_dir == f"runs/{key}/released" and released.starts_from is None
    kept = ("clip_length", "norm_style", "fused_decode_crop", "precision", "val_metadata", "root", "video_chunk_length")
    assert all(getattr(args, name) == getattr(trained.args(), name) for name in kept)
    assert "--lr" not in shell_text(command(released)) and command(released)[0] == "python"


def test_egoschema_takes_the_released_weights_as_its_model():
    released = from_released(recipe("figure5_row6"), "mine.pt")
    assert (
        released.args().pretrain_model == "mine.pt" and released.args().frames == recipe("figure5_row6").flags["frames"]
    )


def test_where_nothing_was_released():
    with pytest.raises(UserError, match="no checkpoint of table8_row8 was released; give a file of your own with"):
        from_released(recipe("table8_row8"), None)
    assert from_released(recipe("table8_row8"), "mine.pt").args().resume == "mine.pt"
    rows = [recipe(f"table8_row{n}") for n in (7, 8)]
    assert [s.run.recipe.key for s in plan(rows, Request(released=True, device="cpu"))] == ["table8_row7"]


# ---- words -----------------------------------------------------------------------------------


def test_more_words_override_the_recipe():
    changed = with_words(
        recipe("table9_row6_retrieval"), ["--epochs", "3", "--betas", "0.8", "0.9", "--no-fused-decode-crop"]
    )
    args = changed.args()
    assert (args.epochs, args.betas, args.fused_decode_crop, args.margin) == (3, [0.8, 0.9], False, 0.2)
    assert changed.starts_from == "table8_row6"
    elsewhere = with_words(recipe("table9_row6_retrieval"), ["--pretrain-model", "hf:a/b/c.pt"])
    assert elsewhere.starts_from is None and elsewhere.args().pretrain_model == "hf:a/b/c.pt"


@pytest.mark.parametrize(
    "word", ["--output-dir=x", "--seed=1", "--evaluate", "--resume=x", "--device=cpu", "--config=x"]
)
def test_what_the_program_sets_itself_is_refused(word):
    with pytest.raises(UserError, match=rf"^{word.split('=')[0]} after `--`: is set by this program"):
        with_words(recipe("table8_row6"), [word])


def test_unknown_words_are_refused_by_the_real_parser():
    with pytest.raises(UserError, match="unknown flag --marigin: did you mean --margin"):
        with_words(recipe("table9_row6_retrieval"), ["--marigin", "1"])


@pytest.mark.parametrize("key", ["table8_row6", "table9_row4_actions", "figure5_row4"])
def test_the_text_is_the_command(key, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    one = recipe(key, output_dir="runs/with space/$HOME")
    text = shell_text(command(one))
    assert shlex.split(text.replace("\\\n", " ")) == command(one)
    assert max(map(len, text.splitlines())) <= 120
    assert command(one)[:4] == ["torchrun", "--standalone", "--nproc_per_node=8", one.entry_point]
    assert executable(command(one))[:4] == [sys.executable, "-m", "avion.engine.torchrun", "--standalone"]
    alone = command(dataclasses.replace(one, gpus=1))
    assert alone[:2] == ["python", one.entry_point]
    assert executable(alone) == [sys.executable, *alone[1:]]


def test_the_script_is_found_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = command(recipe("table8_row6"))[3]
    assert (tmp_path / script).resolve() == RECIPES.parent / "main_pretrain.py"


# ---- what is missing -------------------------------------------------------------------------


@pytest.fixture
def no_gpu_no_hub(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: None)


def whats(recipe, **options):
    return "\n".join(map(str, missing(recipe, **options)))


def test_all_that_is_missing_is_listed_at_once(no_gpu_no_hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = whats(recipe("table8_row6"))
    annotations = "datasets/EK100/epic-kitchens-100-annotations/retrieval_annotations"
    for text in (
        "GPUs: 8 needed, 0 visible: --submit for a SLURM cluster, or --device cpu",
        "folder datasets/Ego4D/videos_288px_15sec/ (--root): docs/data.md",
        "folder datasets/EK100/EK100_320p_15sec/ (--root-val)",
        "file datasets/Ego4D/ego4d_train.pkl (--train-metadata): it comes with LaViLa",
        f"file {annotations}/EPIC_100_retrieval_test.csv (--val-metadata): get it from github.com/epic-kitchens",
        f"file {annotations}/EPIC_100_retrieval_test_sentence.csv (beside --val-metadata)",
        f"file {annotations}/relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl (--relevancy-path): python tools/",
        "OpenAI's CLIP weights, timm/vit_base_patch16_clip_224.openai (",
    ):
        assert text in found, text
    assert len(found.splitlines()) == 8


def test_each_task_names_its_own_files(no_gpu_no_hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    retrieval = whats(recipe("table9_row6_retrieval"), device="cpu")
    assert "caption_relevancy_EPIC_100_retrieval_train.pkl (--train-relevancy-path)" in retrieval
    assert "EPIC_100_retrieval_train_sentence.csv" in retrieval and len(retrieval.splitlines()) == 7
    actions = whats(recipe("table9_row6_actions"), device="cpu")
    assert "EPIC_100_train.csv" in actions and "EPIC_100_validation.csv" in actions and len(actions.splitlines()) == 3
    ego = whats(recipe("table10_row6"), device="cpu")
    assert "questions.json" in ego and "subset_answers.json" in ego and len(ego.splitlines()) == 3


def test_evaluating_needs_no_training_data(no_gpu_no_hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = whats(from_released(recipe("table8_row6"), None), device="cpu")
    assert "Ego4D" not in found and "OpenAI" not in found
    assert (
        "weights hf:cg1177/video-mamba-suite/clip_timemamba_vanilla_base_ego4d4m_bs512_f4.pt: not in the hub's" in found
    )
    assert "HF_HUB_OFFLINE is set; download it elsewhere and give --checkpoint FILE" in found
    avion = recipe("avion")
    assert "a page to download them from by hand" in whats(from_released(avion, None), device="cpu")
    assert "weights no.pt: give the path of a checkpoint" in whats(
        from_released(recipe("avion"), "no.pt"), device="cpu"
    )
    (tmp_path / "yes.pt").touch()
    assert "yes.pt" not in whats(from_released(avion, "yes.pt"), device="cpu")


def test_a_reachable_hub_is_no_problem(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: None)
    monkeypatch.setattr(prerequisites, "hub_is_reachable", lambda: True)
    assert "weights" not in whats(from_released(recipe("table8_row6"), None), device="cpu")
    monkeypatch.setattr(prerequisites, "hub_is_reachable", lambda: False)
    assert "the hub cannot be reached" in whats(from_released(recipe("table8_row6"), None), device="cpu")


def test_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "GPUs: 8 needed, 2 visible: --gpus 2, which keeps the batch" in whats(recipe("table8_row6"))
    assert "GPUs" not in whats(with_processes(recipe("table8_row6"), 2))
    assert "GPUs" not in whats(recipe("table8_row6"), device="cpu") + whats(recipe("table8_row6"), here=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    demo = scaled(recipe("table8_row6"), "demo")
    assert missing(demo) == [] and "GPUs: 1 needed" in whats(demo, device="cuda")


def test_packages(monkeypatch):
    real = prerequisites.importlib.util.find_spec
    gone = ("timm", "av", "decord")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in gone else real(name, *a))
    found = whats(scaled(recipe("table8_row6"), "demo"))
    assert (
        "package timm: pip install -r requirements.txt" in found and "video decoder: neither PyAV nor decord" in found
    )


# ---- what is shown ---------------------------------------------------------------------------


def test_figures_as_text():
    assert figures_text({"avg_map": 26.0}) == "mAP V2T/T2V/avg –/–/26.0"
    assert figures_text({128: 33.4, 16: 38.52}) == "38.52 @16 frames, 33.4 @128 frames"
    four = {"verb_top1": 66.6, "noun_top1": 53.3, "action_top1": 42.8, "action_top5": 63.2}
    assert figures_text(four) == "top-1 verb/noun/action 66.6/53.3/42.8, top-5 action 63.2"
    assert figures_text(four, explained=False) == "top-1 66.6/53.3/42.8, top-5 63.2"


def test_a_step_is_described_whole(no_gpu_no_hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (step,) = plan([recipe("table9_row6_actions")], Request(seeds=(3,)))
    text = described(step)
    for part in (
        "Table 9, row 6: TimeMamba, actions (table9_row6_actions, seed 3)",
        shell_text(step.run.words),
        "paper:    top-1 verb/noun/action 66.6/53.3/42.8, top-5 action 63.2",
        "released: top-1 verb/noun/action 68.5/55.8/46.1, top-5 action 63.8",
        "about 6.5 hours on 8 x A100",
        "missing:  weights runs/table8_row6/seed3/checkpoint.pt, after the last epoch of Table 8, row 6",
    ):
        assert part in text, part
    first, second = plan([recipe("table9_row6_actions")], Request(with_prerequisites=True))
    assert [s.run.recipe.key for s in (first, second)] == ["table8_row6", "table9_row6_actions"]
    assert "after:    table8_row6" in described(second) and second.needs == (first,)


def test_requests_that_cannot_be_meant():
    two = [recipe("table8_row6"), recipe("table8_row7")]
    with pytest.raises(UserError, match="--checkpoint: is of one recipe, and this asks for table8_row6, table8_row7"):
        plan(two, Request(released=True, checkpoint="x.pt"))
    with pytest.raises(UserError, match="--seed: an evaluation of released weights draws nothing"):
        plan(two, Request(released=True, seeds=(1,)))


def test_the_record_of_a_run():
    run = Run(scaled(recipe("table10_row6"), "demo", "r", seed=4))
    assert run.record() == {
        "recipe": "table10_row6",
        "scale": "demo",
        "seed": 4,
        "evaluated": "trained",
        "checkpoint": "r/table8_row6/seed4/checkpoint.pt",
    }
