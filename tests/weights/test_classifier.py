"""Classifiers: dropout and drop path in every tower, checkpoints that say what they are, and what is refused."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.models import load_checkpoint, model_from_checkpoint
from avion.models.model_clip import VideoClassifier
from avion.models.registry import model_config
from avion.weights import Checkpoint, classifier_from_checkpoint, save_weights
from tests.models.tiny import DISTINCT_MODELS, tiny_inputs, tiny_model
from tests.weights import upstream_files
from tests.weights.checkpoints import FIXTURES, NAMES

ACTIONS = ["0:1", "0:2", "12:10"]
PREPROCESS = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}


def tiny_classifier(name, dropout=0.0, **overrides):
    model = tiny_model(name, **overrides)
    classifier = VideoClassifier(model.visual, dropout, len(ACTIONS), config=model.config, actions=ACTIONS)
    torch.nn.init.normal_(classifier.fc_cls.weight)
    torch.nn.init.normal_(classifier.fc_cls.bias)
    return classifier


@pytest.fixture
def saved(tmp_path):
    model = tiny_classifier("TIMESFORMER_VITB16", dropout=0.5)
    save_weights(model, tmp_path / "cls.pt", PREPROCESS)
    return model.eval(), tmp_path / "cls.pt"


class TestRegularisation:
    @pytest.mark.parametrize("name", DISTINCT_MODELS)
    def test_drop_path_drops_whole_residual_branches_in_training_only(self, name):
        """At a rate near 1 the last block is left out: its parameters get no gradient from most clips."""
        video, _ = tiny_inputs(clips=3)
        torch.manual_seed(0)
        dropping, plain = tiny_classifier(name, drop_path_rate=0.999), tiny_classifier(name)
        plain.load_state_dict(dropping.state_dict())
        torch.testing.assert_close(dropping.eval()(video), plain.eval()(video))
        assert not torch.allclose(dropping.train()(video), plain.train()(video))
        torch.manual_seed(1)
        dropping.zero_grad()
        dropping(video).sum().backward()
        blocks = getattr(dropping.visual, "blocks", None) or dropping.visual.transformer.resblocks
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in blocks[-1].mlp.parameters())
        assert any(p.grad.abs().max() > 0 for p in blocks[0].mlp.parameters())  # of rate 0, as the first always is

    @pytest.mark.parametrize("name", DISTINCT_MODELS)
    def test_dropout_zeroes_half_of_the_heads_input_in_training_only(self, name):
        video, _ = tiny_inputs(clips=4)
        model, seen = tiny_classifier(name, dropout=0.5), []
        model.fc_cls.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        model.train()(video)
        model.eval()(video)
        dropped, whole = seen
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], 2 * whole[kept])
        assert 0.3 < kept.float().mean() < 0.7 and (whole != 0).all()


class TestCheckpoints:
    @pytest.mark.parametrize("name", DISTINCT_MODELS)
    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_saved_and_built_again(self, name, suffix, tmp_path):
        model = tiny_classifier(name, dropout=0.5).eval()
        save_weights(model, tmp_path / f"cls.{suffix}", PREPROCESS)
        head = Checkpoint.open(tmp_path / f"cls.{suffix}").head
        assert (head.num_classes, head.actions) == (3, tuple(ACTIONS))
        again = classifier_from_checkpoint(tmp_path / f"cls.{suffix}", drop_path_rate=0.2).eval()
        assert again.config.name == name and again.config.drop_path_rate == 0.2 and again.actions == tuple(ACTIONS)
        video, _ = tiny_inputs()
        assert torch.equal(again(video), model(video))

    @pytest.mark.parametrize("name", [n for n in DISTINCT_MODELS if "FROZEN" not in n and "SPACETIME" not in n])
    def test_upstreams_layout(self, name, tmp_path):
        """`module.visual.*`, `module.fc_cls.*`; args without a model; heads of 64 channels."""
        model = tiny_classifier(name, embed_dim=64, num_heads=1).eval()
        weights = {f"module.{key}": value for key, value in model.state_dict().items()}
        args = argparse.Namespace(num_classes=3.0, clip_length=4, pretrain_model="clip.pt", norm_style="openai")
        torch.save({"epoch": 1, "state_dict": weights, "args": args, "best_acc1": 0.1}, tmp_path / "up.pt")
        overrides = {"gated_time": True} if model_config(name).gated_time else {}
        again = classifier_from_checkpoint(tmp_path / "up.pt", name=name, **overrides).eval()
        video, _ = tiny_inputs()
        assert torch.equal(again(video), model(video)) and again.actions is None
        if model_config(name).tower == "divided":  # vanilla or Frozen, time or space-time: nothing in the file says
            with pytest.raises(UserError, match="give name="):
                classifier_from_checkpoint(tmp_path / "up.pt")

    @pytest.mark.parametrize("version, name", [
        ("1.5", "ID6"), ("1.5_legacy", "ID6"), ("2.2", "ID4"), ("3", "ID6"), ("3_pyarrow", "ID4"),
    ])  # fmt: skip
    def test_upstreams_files_with_a_table_of_pandas(self, version, name):
        """Its own list of actions; its logits are upstream's embeddings of the same tower (see upstream_files.py)."""
        path = FIXTURES / f"classifier_pandas{version}.pt"
        model = classifier_from_checkpoint(path, name=NAMES[name], num_heads=4).eval()
        assert model.actions == tuple(upstream_files.ACTIONS) and model.config.num_frames == 4
        video, expected = upstream_files.expected_logits(name)
        torch.testing.assert_close(F.normalize(model(video), dim=-1), expected, rtol=0, atol=1e-5)
        again = classifier_from_checkpoint(path, name=NAMES[name], num_heads=4)
        assert load_checkpoint(again, path).loaded == len(model.state_dict())

    def test_the_list_of_upstreams_args(self):
        """The two mappings; the table where there are none; nothing where there is neither."""
        saved = dict(Checkpoint.open(FIXTURES / "classifier_pandas2.2.pt").contents)
        args = saved["args"]
        for left_out in (("actions",), ("mapping_act2v", "mapping_act2n")):
            kept = {k: v for k, v in vars(args).items() if k not in left_out}
            head = Checkpoint(saved | {"args": argparse.Namespace(**kept)}).head
            assert head.actions == tuple(upstream_files.ACTIONS)
        neither = argparse.Namespace(model="x", mapping_act2v=None)
        assert Checkpoint(saved | {"args": neither}).head.actions is None
        args.actions = {"not": "a table"}
        assert Checkpoint(saved).head.actions == tuple(upstream_files.ACTIONS)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda a: a.mapping_act2v.update({3: 90}), r"action 3 is verb and noun \(.*\) in args.actions, \(90, "),
            (
                lambda a: a.mapping_act2n.pop(31),
                "args.mapping_act2n must give a class for each of the head's 32 .* 31 entries",
            ),
            (lambda a: a.mapping_act2n.update({32: 1}), "found 33 entries"),
            (lambda a: a.mapping_act2v.update({0: "1"}), "args.mapping_act2v must hold class numbers, found '1'"),
            (lambda a: a.mapping_act2v.update({0: True}), "must hold class numbers"),
            (lambda a: a.mapping_act2v.update({0: -1}), "must hold class numbers"),
            (lambda a: a.mapping_act2v.update({0: 1.5}), "must hold class numbers"),
            (lambda a: setattr(a, "mapping_act2v", None), "holds args.mapping_act2n without the other"),
            (lambda a: setattr(a, "mapping_act2v", [1] * 32), "found a list"),
            (lambda a: setattr(a, "mapping_act2v", a.actions), "found a pandas.core.frame.DataFrame"),
        ],
    )
    def test_a_list_that_contradicts_itself(self, change, message):
        saved = dict(Checkpoint.open(FIXTURES / "classifier_pandas1.5.pt").contents)
        change(saved["args"])
        with pytest.raises(UserError, match=message) as error:
            assert Checkpoint(saved, "cls.pt").head
        assert "cls.pt: " in str(error.value) and "\n" not in str(error.value)

    def test_more_frames_and_larger_pictures_resize(self, saved):
        _, path = saved
        again = classifier_from_checkpoint(path, num_frames=6, img_size=48)
        assert again.visual.temporal_embed.shape[1] == 6 and again.visual.pos_embed.shape[1] == 10
        assert "resized" in str(again.load_report)


class TestRefused:
    def test_a_dual_encoder_as_classifier(self, tmp_path):
        model = tiny_model("TIMEMAMBA_VITB16")
        save_weights(model, tmp_path / "dual.pt", PREPROCESS)
        with pytest.raises(UserError, match=r"dual.pt: has no classification head .*--pretrain-model"):
            classifier_from_checkpoint(tmp_path / "dual.pt")
        with pytest.raises(UserError, match="has no classification head"):
            load_checkpoint(tiny_classifier("TIMEMAMBA_VITB16"), tmp_path / "dual.pt")

    def test_a_classifier_as_dual_encoder(self, saved):
        model, path = saved
        with pytest.raises(UserError, match="cls.pt: is a fine-tuned classifier without a text tower"):
            model_from_checkpoint(path)
        with pytest.raises(UserError, match="it is a fine-tuned classifier, which has no text tower"):
            load_checkpoint(tiny_model("TIMESFORMER_VITB16"), path)
        assert load_checkpoint(tiny_classifier("TIMESFORMER_VITB16"), path).loaded == len(model.state_dict())

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda c: c["classifier"].update(num_classes=4), "does not fit its head of 3 classes"),
            (lambda c: c["classifier"].update(actions=ACTIONS[:2]), "must be a list of 3 texts"),
            (lambda c: c["classifier"].update(actions="0:1"), "must be a list of 3 texts"),
            (lambda c: c["classifier"].update(actions=[1, 2, 3]), "must be a list of 3 texts"),
            (lambda c: c.update(classifier=[3]), "does not fit its head"),
            (lambda c: c["state_dict"].pop("fc_cls.bias"), "its head has shapes"),
            (lambda c: c["state_dict"].update({"fc_cls.weight": torch.zeros(3)}), "its head has shapes"),
            (lambda c: c["state_dict"].update({"fc_cls.weight": torch.zeros(3, 7)}), "fc_cls.weight"),
        ],
    )
    def test_a_head_that_contradicts_itself(self, saved, change, message):
        _, path = saved
        content = torch.load(path)
        change(content)
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            classifier_from_checkpoint(path)
        assert "cls.pt" in str(error.value) and "\n" not in str(error.value)
