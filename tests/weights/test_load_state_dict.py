"""PyTorch's own `load_state_dict` with upstream's names, and what it says where a file does not fit."""

import copy
import re

import pytest
import torch
from torch import nn

from avion.models import model_from_checkpoint
from avion.models.names import rename_to_ours
from avion.weights import classifier_from_checkpoint
from avion.weights.files import read_checkpoint
from tests.models.tiny import DISTINCT_MODELS, tiny_model
from tests.weights import upstream_files
from tests.weights.checkpoints import HEADS, NAMES, assert_same_outputs, contents, fixture, tiny

FLASH = {".attn.in_proj_": ".attn.Wqkv.", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def other_names(weights):
    """As AVION saves the same model with the other attention: every name of FLASH in its other form."""
    there, back = FLASH, {new: old for old, new in FLASH.items()}
    pattern = re.compile("|".join(map(re.escape, [*there, *back])))
    return {pattern.sub(lambda match: (there | back)[match[0]], name): value for name, value in weights.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_of_a_released_file(name, prefix):
    weights = {key.removeprefix("module."): value for key, value in contents(name)["state_dict"].items()}
    wanted = model_from_checkpoint(fixture(name), **HEADS)
    for layout in (weights, weights if name == "LAVILA" else other_names(weights)):
        model = tiny(NAMES[name])
        given = {prefix + key: value for key, value in layout.items()}
        before = dict(given)
        assert tuple(model.load_state_dict(given)) == ([], [])
        assert given.keys() == before.keys()  # the caller's dict stays as it was
        assert_same_outputs(model, wanted)


@pytest.mark.parametrize("fast", [True, False])
def test_both_forms_of_conv1(fast):
    model = tiny("CLIP_VITB16")
    weights = {k: v.clone() for k, v in tiny("CLIP_VITB16").state_dict().items()}
    conv1 = weights["visual.conv1.weight"]  # (D, C, P, P)
    given = weights | {"visual.conv1.weight": conv1.reshape(len(conv1), -1) if fast else conv1}
    assert tuple(model.load_state_dict(given, assign=True)) == ([], [])
    assert torch.equal(model.visual.conv1.weight, conv1)


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_every_model_takes_its_own_and_wrapped_names(name):
    source, target = tiny_model(name), tiny_model(name)
    wrapper = nn.Module()  # as DistributedDataParallel keeps the model, with another name inside
    wrapper.module = copy.deepcopy(target)
    for model in (target, wrapper):
        weights = {f"module.{key}": value for key, value in other_names(source.state_dict()).items()}
        if "LAVILA" in name:
            weights = {f"module.{key}": value for key, value in source.state_dict().items()}
        assert tuple(model.load_state_dict(weights)) == ([], [])
        found = getattr(model, "module", model).state_dict()
        assert all(torch.equal(found[key], value) for key, value in source.state_dict().items())


def test_a_classifier():
    path = upstream_files.FIXTURES / "classifier_pandas1.5.pt"
    model = classifier_from_checkpoint(path, name=NAMES["ID6"], num_heads=4)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    nn.init.zeros_(model.fc_cls.weight)
    assert tuple(model.load_state_dict(read_checkpoint(path)["state_dict"])) == ([], [])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in wanted.items())


def test_what_does_not_fit_is_pytorchs_error_and_names_load_checkpoint():
    model = tiny("TIMEMAMBA_VITB16")
    for given in (contents("ID4")["state_dict"], contents("VIT")["state_dict"], {}, {"x": torch.ones(1)}):
        with pytest.raises(
            RuntimeError, match=r"(?s)Error.* in loading state_dict for CLIP.*load_checkpoint\(model, path\)"
        ):
            model.load_state_dict(given)
    weights = contents("ID6")["state_dict"]
    weights["module.visual.pos_embed"] = torch.zeros(1, 10, 64)
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch for visual.pos_embed.*load_checkpoint"):
        model.load_state_dict(weights, strict=False)


def test_strict_false_reports_the_models_names():
    model = tiny("CLIP_VITB16")
    weights = other_names(contents("VIT")["state_dict"])
    del weights["module.visual.transformer.resblocks.0.attn.in_proj_weight"]
    weights["module.extra.thing"] = torch.ones(1)
    result = model.load_state_dict(weights, strict=False)
    assert result.missing_keys == ["visual.transformer.resblocks.0.attn.Wqkv.weight"]
    assert result.unexpected_keys == ["module.extra.thing"]


def test_two_entries_for_one_parameter_are_not_chosen_between():
    model = tiny("CLIP_VITB16")
    own, flash = "visual.transformer.resblocks.0.mlp.fc1.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight"
    weights = model.state_dict() | {flash: torch.zeros(256, 64)}
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{flash}"'):
        model.load_state_dict(weights)
    two = {"module.w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}
    rename_to_ours(two, "", ["w"])
    assert two.keys() == {"module.w", "_orig_mod.w"}
    assert own in model.state_dict()
