import dataclasses
import re

import pytest
import yaml

from avion.engine.args import build_parser, parse
from avion.engine.options import PretrainOptions
from avion.errors import UserError

# AVION's flags of main_pretrain.py and their defaults, as people's scripts rely on them.
AVION_DEFAULTS = """
dataset ego4d
root datasets/Ego4D/videos_320px_15sec/
root-val datasets/EK100/EK100_320p_15sec/
train-metadata datasets/Ego4D/ego4d_train.pkl
val-metadata datasets/EK100/epic-kitchens-100-annotations/retrieval_annotations/EPIC_100_retrieval_test.csv
output-dir ./
video-chunk-length 15
clip-length 4
clip-stride 16
norm-style openai
decode-threads 1
model CLIP_VITB16
patch-dropout 0
drop-path-rate 0
resume
pretrain-zoo openai
project-embed-dim 256
context-length 77
vocab-size 49408
epochs 5
warmup-epochs 1
start-epoch 0
batch-size 16
optimizer adamw
lr 3e-05
lr-start 1e-06
lr-end 1e-05
update-freq 1
wd 0.01
eps 1e-08
eval-freq 1
print-freq 10
workers 8
world-size 1
rank 0
local-rank 0
dist-url env://
dist-backend nccl
seed 0
"""
AVION_SWITCHES = """
--fused-decode-crop --no-fused-decode-crop --grad-checkpointing --no-grad-checkpointing --use-fast-conv1
--disable-fast-conv1 --use-flash-attn --disable-flash-attn --freeze-temperature --no-freeze-temperature --use-zero
--no-use-zero --local-loss --gather-with-grad --no-gather-with-grad --fix-lr --disable-amp --evaluate --use-bf16
"""


def read(*words):
    return parse(PretrainOptions, list(words), "main_pretrain.py", "")


@pytest.mark.parametrize("line", AVION_DEFAULTS.strip().splitlines())
def test_avions_flags_keep_their_defaults(line):
    name, _, value = line.partition(" ")
    default = getattr(read(), name.replace("-", "_"))
    assert default == type(default)(value)


@pytest.mark.parametrize("switch", AVION_SWITCHES.split())
def test_avions_switches_are_accepted_and_do_something(switch):
    opposite = re.sub(r"^--(no|disable)-(?!amp)", "--", switch)
    before = (
        read()
        if opposite == switch
        else read(opposite.replace("--fast", "--use-fast").replace("--flash", "--use-flash"))
    )
    start = read("--no-gather-with-grad") if switch == "--gather-with-grad" else before
    assert read(switch) != start


def test_short_and_underscored_spellings_and_several_values():
    args = read("-j", "3", "--local_rank=2", "--betas", "0.8", "0.95", "--train-metadata-aux", "a.pkl", "b.pkl")
    assert (args.workers, args.local_rank, args.betas) == (3, 2, [0.8, 0.95])
    assert args.train_metadata_aux == ["a.pkl", "b.pkl"]
    assert args.given() == {"workers", "local_rank", "betas", "train_metadata_aux"}


def test_unknown_flag_names_the_near_ones():
    with pytest.raises(UserError, match=r"unknown flag --bach-size: did you mean --batch-size"):
        read("--bach-size=4")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-size", "many"], "--batch-size: found 'many', expected a whole number from 1 to 1000000"),
        (["--norm-style", "imagenet"], "--norm-style: invalid choice: 'imagenet'"),
        (["--betas", "0.9"], "--betas: expected 2 arguments"),
        (["--mod", "CLIP_VITB16"], "unknown flag --mod"),
        (["stray"], "unexpected value 'stray'"),
    ],
)
def test_bad_values_are_one_line(words, message):
    with pytest.raises(UserError) as error:
        read(*words)
    assert message in str(error.value) and "\n" not in str(error.value)


def write(path, **content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_config_file_sets_flags_and_the_command_line_overrides_it(tmp_path):
    path = write(
        tmp_path / "run.yaml",
        **{
            "batch-size": 7,
            "lr": 1e-4,
            "freeze_temperature": True,
            "gather-with-grad": False,
            "betas": [0.5, 0.6],
            "model-args": {"depth": 3, "act_layer": "gelu"},
        },
    )
    args = read("--lr", "2e-4", "--config", path)
    assert (args.batch_size, args.lr, args.freeze_temperature, args.gather_with_grad) == (7, 2e-4, True, False)
    assert args.betas == [0.5, 0.6] and sorted(args.model_args) == ["act_layer=gelu", "depth=3"]
    assert args.was_given("batch_size") and args.was_given("lr") and not args.was_given("epochs")


@pytest.mark.parametrize(
    "content, message",
    [
        ("batchsize: 3", "unknown key 'batchsize': did you mean batch_size"),
        ("batch-size: many", "key 'batch-size': argument --batch-size: found 'many', expected a whole number from 1"),
        ("batch-size: 4\nbatch_size: 4", "key 'batch_size': batch_size is there already"),
        ("lr: .nan", "key 'lr': argument --lr: found 'nan', expected a number above 0"),
        ("betas: [0.9, 1]", "key 'betas': argument --betas: found '1', expected a number from 0 to below 1"),
        ("lr: [1]", "key 'lr' is [1], expected a number"),
        ("lr: {a: 1}", "key 'lr' is {'a': 1}, expected a number"),
        ("grad-clip-norm: true", "key 'grad-clip-norm' is True, expected a number"),
        ("fix-lr: 1", "key 'fix-lr' is 1, expected true or false"),
        ("batch-size:", "key 'batch-size' has no value"),
        ("batch-size: true", "key 'batch-size' is True, expected a whole number"),
        ("- batch-size", "expected a mapping of flags to values, found list"),
        ("a: [1", "not valid YAML at line"),
    ],
)
def test_bad_config_files_are_one_line_with_their_name(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read("--config", str(path))
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, words, message",
    [
        ("lr: 1e-6", [], "run.yaml: --lr-end 1e-05: is above --lr 1e-06"),
        ("model-args: {depth: }", [], "run.yaml: --model-args depth=None: found 'None'"),
        (
            "model-args: {num_frames: 8}",
            ["--clip-length", "4"],
            "run.yaml: --clip-length 4 and --model-args num_frames=8",
        ),
        ("epochs: 4", ["--lr", "1e-6"], "^--lr-end 1e-05: is above --lr 1e-06"),
        ("lr: 1e-4", ["--lr", "1e-6"], "^--lr-end 1e-05: is above --lr 1e-06"),
    ],
)
def test_a_combination_names_the_file_that_has_part_in_it(tmp_path, content, words, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read("--config", str(path), *words)
    assert "\n" not in str(error.value)


def test_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: cannot be read"):
        read("--config", str(tmp_path / "nowhere.yaml"))


def test_help_lists_every_flag_in_groups_with_its_default():
    text = build_parser(PretrainOptions, "main_pretrain.py", "").format_help()
    for name in read().values():
        assert "--" + name.replace("_", "-") in text
    for group in ("pretraining:", "video:", "model:", "optimisation:", "run:", "device and processes:"):
        assert group in text
    assert "[3e-05]" in text


def test_options_are_frozen():
    options = read("--lr", "1e-3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.invented = 1


def test_options_know_which_flags_were_given():
    options = read("--lr", "3e-5", "--model-args", "num_frames=6")
    assert options.was_given("lr") and not options.was_given("epochs")
    assert options.was_given("clip_length"), "a flag that --model-args sets"
    assert dataclasses.replace(options, epochs=7).given() == options.given()
    with pytest.raises(AttributeError, match="PretrainOptions has no flag learning_rate"):
        options.was_given("learning_rate")


def test_values_are_the_flags_alone():
    values = read("--model", "TIMEMAMBA_VITB16").values()
    assert values["model"] == "TIMEMAMBA_VITB16" and values["betas"] == [0.9, 0.999]
    assert not {name for name in values if "given" in name}
