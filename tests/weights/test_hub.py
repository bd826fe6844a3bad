"""Folders and repositories of the hub: the same model comes back, and the card says what it is."""

import base64
import http.server
import json
import threading
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin

from avion.commands import convert_checkpoint
from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.models import classifier_from_checkpoint, model_from_checkpoint
from avion.models.clip import CLIP, VideoClassifier
from avion.weights import save_weights
from tests.layering import ROOT
from tests.models.tiny import tiny_model

FIXTURES = ROOT / "tests/fixtures"
FACTS = {"recipe": "table8_row6", "metrics": {"avg_map": 12.345}, "licence": "cc-by-nc-4.0"}


def inputs(model):
    c = model.config
    return torch.randn(2, 3, c.num_frames, c.img_size, c.img_size), torch.randint(
        1, c.vocab_size, (2, c.context_length)
    )


def assert_same(a, b):
    video, tokens = inputs(a)
    words = (video,) if isinstance(a, VideoClassifier) else (video, tokens)
    with torch.no_grad():
        torch.testing.assert_close(a(*words), b(*words), rtol=0, atol=0)


@pytest.fixture
def model():
    torch.manual_seed(5)
    return tiny_model("TIMEMAMBA_VITB16").eval()


@pytest.fixture
def classifier():
    torch.manual_seed(6)
    towers = tiny_model("TIMEMAMBA_VITB16")
    return VideoClassifier(towers.visual, 0.1, 3, config=towers.config, actions=("0:1", "0:2", "4:2")).eval()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """As much of a hub as a download, a new repository and a commit need, on this machine. {(repo, name): bytes}."""
    files: dict[tuple[str, str], bytes] = {}

    class Hub(http.server.BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def answer(self, body=None, status=200, **headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_HEAD(self):
            self.asked.append(self.path)
            owner, repo, kind, _, *name = [*self.path.strip("/").split("/"), "", "", "", ""][:5]
            data = files.get((f"{owner}/{repo}", "/".join(filter(None, name)))) if kind == "resolve" else None
            if self.path == "/":
                self.answer(b"")
            elif data is None:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(data, ETag='"0123"', X_Repo_Commit="c" * 40)

        do_GET = do_HEAD

        def do_POST(self):
            self.asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            repo = "/".join(self.path.split("/")[3:5])
            if self.path == "/api/repos/create":
                name = json.loads(body)
                self.answer({"url": f"{endpoint}/{name.get('organization') or 'owner'}/{name['name']}"})
            elif "/preupload/" in self.path:
                named = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                self.answer({"files": [{k: f[k] for k in ("path", "uploadMode", "shouldIgnore")} for f in named]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[repo, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{endpoint}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40})
            else:
                self.answer({"errors": [], "warnings": []})

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", _api_at(endpoint))
    yield files
    server.shutdown()
    server.server_close()


def _api_at(endpoint, before=huggingface_hub.HfApi.__init__):
    def init(self, *args, **keywords):
        before(self, *args, **{**keywords, "endpoint": endpoint, "token": "hf_" + "x" * 30})

    return init


def test_both_models_are_of_the_hubs_kind():
    assert issubclass(CLIP, PyTorchModelHubMixin) and issubclass(VideoClassifier, PyTorchModelHubMixin)


def test_a_folder_and_back(model, tmp_path):
    model.save_pretrained(tmp_path / "a", norm_style="openai_legacy", model_card_kwargs=FACTS)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = CLIP.from_pretrained(tmp_path / "a")
    assert not again.training and again.config == model.config
    assert_same(again, model)
    assert_same(model_from_checkpoint(tmp_path / "a/model.safetensors"), model)
    assert again.preprocess["norm_style"] == "openai_legacy"
    assert list(again.preprocess["mean"]) == list(NORM_STYLES["openai_legacy"].mean)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (
        config["model_config"]["name"] == "TIMEMAMBA_VITB16" and config["preprocess"]["norm_style"] == "openai_legacy"
    )
    again.save_pretrained(str(tmp_path / "b"))  # it knows its normalisation by now
    assert_same(CLIP.from_pretrained(str(tmp_path / "b")), model)


def test_fields_can_be_changed(model, tmp_path):
    model.save_pretrained(tmp_path / "a", norm_style="openai")
    again = CLIP.from_pretrained(tmp_path / "a", num_frames=model.config.num_frames + 2)
    assert again.config.num_frames == model.config.num_frames + 2
    with pytest.raises(UserError, match="unknown field 'num_frame'"):
        CLIP.from_pretrained(tmp_path / "a", num_frame=3)


def test_a_classifier_keeps_its_actions(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "a", norm_style="openai")
    again = VideoClassifier.from_pretrained(tmp_path / "a")
    assert again.actions == ("0:1", "0:2", "4:2") and not again.training
    assert_same(again, classifier)
    with pytest.raises(UserError, match="is a fine-tuned classifier"):
        CLIP.from_pretrained(tmp_path / "a")


def test_the_card(model, classifier, tmp_path):
    model.save_pretrained(tmp_path / "a", norm_style="openai", model_card_kwargs=FACTS)
    card = ModelCard.load(tmp_path / "a/README.md")
    assert card.data.license == "cc-by-nc-4.0" and card.data.library_name == "avion"
    for text in ("| recipe | table8_row6 |", "| avg_map | 12.35 |", "openai: mean [", "CLIP.from_pretrained("):
        assert text in card.text
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card.text
    classifier.save_pretrained(tmp_path / "b", norm_style="openai")
    card = ModelCard.load(tmp_path / "b/README.md")
    assert "classifier of 3 classes" in card.text and card.data.pipeline_tag == "video-classification"
    assert "| recipe | not stated |" in card.text and "Metrics" not in card.text


def test_a_repository_and_back(model, hub):
    with pytest.raises(UserError, match="has no file model.safetensors"):
        CLIP.from_pretrained("owner/repo")
    with pytest.raises(UserError, match="give norm_style="):
        model.push_to_hub("owner/repo")
    model.preprocess = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}
    model.push_to_hub("owner/repo", model_card_kwargs=FACTS)
    assert {name for repo, name in hub if repo == "owner/repo"} == {"README.md", "config.json", "model.safetensors"}
    assert b"| avg_map | 12.35 |" in hub["owner/repo", "README.md"]
    assert_same(CLIP.from_pretrained("owner/repo"), model)
    assert_same(CLIP.from_pretrained("owner/repo", local_files_only=True), model)
    with pytest.raises(UserError, match="owner/repo: model.safetensors cannot be had"):
        CLIP.from_pretrained("owner/repo", revision="elsewhere", local_files_only=True)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no such thing", "no such folder, and not of the form owner/repo"),
        ("a/b/c", "no such folder, and not of the form owner/repo"),
        (".", r"\.: has no model.safetensors"),
    ],
)
def test_what_is_no_model_is_one_line(where, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        CLIP.from_pretrained(where)
    assert "\n" not in str(error.value)


def test_a_style_that_does_not_exist(model, tmp_path):
    with pytest.raises(UserError, match="norm_style 'imagenet': expected one of openai"):
        model.save_pretrained(tmp_path / "a", norm_style="imagenet")


@pytest.mark.parametrize("name", ["ID4", "ID6", "VIT", "LAVILA"])
def test_the_converter_writes_folders_of_every_layout(name, tmp_path):
    source = FIXTURES / f"{name}_checkpoint.pt"
    heads = ["--model-args", "num_heads=4", "text_heads=4"]
    words = [str(source), str(tmp_path / "out"), *heads]
    assert convert_checkpoint.main(words) == 0
    expected = model_from_checkpoint(source, num_heads=4, text_heads=4)
    assert_same(CLIP.from_pretrained(tmp_path / "out"), expected)
    assert convert_checkpoint.main(words) == 2
    assert convert_checkpoint.main([*words, "--force"]) == 0


def test_the_converter_takes_classifiers(classifier, tmp_path):
    save_weights(classifier, tmp_path / "a.pt", {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()})
    for target in ("b.safetensors", "folder"):
        assert convert_checkpoint.main([str(tmp_path / "a.pt"), str(tmp_path / target)]) == 0
    assert_same(classifier_from_checkpoint(tmp_path / "b.safetensors"), classifier)
    assert_same(VideoClassifier.from_pretrained(tmp_path / "folder"), classifier)
