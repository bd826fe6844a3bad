"""Classes as texts, and the call for one video."""

import numpy as np
import pytest
import torch

from avion.constants import NORM_STYLES
from avion.data.tokenizer import tokenize
from avion.engine.features import extract, load_clip
from avion.engine.zeroshot import class_embeddings, classify_video
from avion.engine.zeroshot.classes import EGO4D, class_texts, mean_of_units
from avion.errors import UserError
from avion.models import model_from_checkpoint
from avion.weights import Checkpoint, save_weights
from tests.models.tiny import tiny_model
from tests.videos import write_video

PREPROCESS = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_mean_of_units_by_hand():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-5.0, 0.0]])
    found = mean_of_units(features, [[0, 1], [2], [1, 2]])
    # Of (0.6, 0.8) and (0, 1) the mean is (0.3, 0.9), of length sqrt(0.9).
    wanted = [[0.3 / 0.9**0.5, 0.9 / 0.9**0.5], [-1.0, 0.0], [-(0.5**0.5), 0.5**0.5]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_the_texts_of_a_class_are_all_names_in_all_templates():
    assert class_texts(["cut {onion}", ["a", "b"]], EGO4D) == [
        ["#C C cut {onion}", "#C cut {onion}"],
        ["#C C a", "#C C b", "#C a", "#C b"],
    ]


@pytest.mark.parametrize("name", ["TIMEMAMBA_VITB16", "CLIP_VITB16", "LAVILA_TSF_B16"])
def test_embeddings_equal_the_definition_in_float64(name):
    model = tiny_model(name).train()
    names = ["open drawer", ["cut onion", "chop onion", "slice onion"], *(f"class {i}" for i in range(70))]
    templates = ["{}", "#C C {}", "a video of {}."]
    found = class_embeddings(model, names, templates)
    assert found.dtype == torch.float32 and not model.training and len(found) == 72
    torch.testing.assert_close(found.norm(dim=1), torch.ones(72))
    for number, own in enumerate(names):
        texts = [t.replace("{}", n) for n in ([own] if isinstance(own, str) else own) for t in templates]
        with torch.no_grad():
            rows = model.encode_text(tokenize(texts, context_length=16, vocab_size=512)).double().numpy()
        np.testing.assert_allclose(found[number].numpy(), unit(unit(rows).mean(axis=0)), atol=2e-6)


def test_scores_are_cosines_of_the_whole_video(tmp_path):
    model = tiny_model("TIMEMAMBA_VITB16")
    write_video(tmp_path / "v.mp4", 50)
    classes = class_embeddings(model, ["open drawer", "cut onion", "pour water"])
    for more, frames in ({}, 4), ({"frames": 7, "start": 0.3, "end": 1.2}, 7), ({"norm_style": "openai_legacy"}, 4):
        scores = classify_video(model, tmp_path / "v.mp4", classes, **more)
        rest = {k: v for k, v in more.items() if k != "frames"}
        feature = extract(model, load_clip(tmp_path / "v.mp4", frames, model, **rest), ["clip"])["clip"][0]
        wanted = unit(feature.double().numpy()) @ classes.double().numpy().T
        np.testing.assert_allclose(scores.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "names, templates, what",
    [
        ([], ["{}"], "classes: none"), (["a"], [], "templates: none"), (["a"], ["no slot"], "'no slot': exactly one"),
        (["a"], ["{} {}"], "exactly one"), (["a", " "], ["{}"], "class 1: an empty name"), ([[]], ["{}"], "no name"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_class_is_said(names, templates, what):
    with pytest.raises(UserError, match=what):
        class_embeddings(tiny_model("TIMEMAMBA_VITB16"), names, templates)


def test_a_model_from_a_checkpoint_is_in_evaluation_mode(tmp_path):
    """Though it may have been built with drop path, which is for training alone."""
    save_weights(tiny_model("TIMEMAMBA_VITB16"), tmp_path / "model.pt", PREPROCESS)
    model = model_from_checkpoint(tmp_path / "model.pt", drop_path_rate=0.9)
    assert not any(module.training for module in model.modules())
    assert Checkpoint.open(tmp_path / "model.pt").build().training  # which training code builds
