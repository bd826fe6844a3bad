"""The checkpoints of tests/fixtures, models of their sizes, and what both must give."""

from pathlib import Path

import pytest
import torch

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.models import create_model, load_checkpoint
from avion.weights.files import read_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = {
    "ID4": "TIMESFORMER_VITB16",
    "ID6": "TIMEMAMBA_VITB16",
    "VIT": "CLIP_VITB16",
    "LAVILA": "LAVILA_TSF_B16",
}
HEADS = {"num_heads": 4, "text_heads": 4}  # not to be seen in a checkpoint's shapes
SIZES = HEADS | {
    "img_size": 32,
    "embed_dim": 64,
    "depth": 2,
    "project_embed_dim": 32,
    "context_length": 16,
    "vocab_size": 512,
    "text_width": 48,
    "text_layers": 2,
}
OPENAI = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}


def fixture(name):
    return FIXTURES / f"{name}_checkpoint.pt"


def contents(name):
    """A fixture, in memory and with its weights writable."""
    saved = read_checkpoint(fixture(name))
    return saved | {"state_dict": {k: v.clone() for k, v in saved["state_dict"].items()}}


def tiny(name, **overrides):
    """A new model of a fixture's sizes; zero-initialised parameters made to count."""
    model = create_model(name, **(SIZES | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def outputs(model, video=None, tokens=None):
    expected = torch.load(FIXTURES / "ID4_expected.pt", weights_only=True)
    video = expected["video"] if video is None else video
    tokens = expected["tokens"] if tokens is None else tokens
    with torch.no_grad():
        return model.eval()(video, tokens)


def assert_same_outputs(a, b, **inputs):
    for x, y in zip(outputs(a, **inputs), outputs(b, **inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def refused_load(model, path, **kwargs) -> str:
    """The message, after checking that the model is as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    text = refusal(load_checkpoint, model, path, **kwargs)
    assert str(path) in text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return text
