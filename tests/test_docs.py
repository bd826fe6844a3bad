"""Pages whose code and quotations must not rot: the model in 30 lines, the messages of the troubleshooting page."""

import ast
import re
import sys

import pytest
import torch

import avion.weights
from avion.constants import NORM_STYLES
from avion.data.tokenizer import tokenize
from avion.data.transforms import normalize_clip
from avion.engine.args import parse
from avion.engine.options import PretrainOptions
from avion.engine.precision import Precision
from avion.engine.steps import contrastive_step
from avion.models import create_model, list_models, load_checkpoint, model_from_checkpoint, registry
from avion.models.long_video import encode_long_video
from avion.models.model_clip import VideoClassifier
from avion.models.utils import time_gates
from avion.optim import build_optimizer
from avion.weights import load_pretrained, save_weights
from tests.layering import ROOT, project_sources
from tests.models.registered import registered_for_a_while

DOCS = ROOT / "docs"


def code_blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


# --- docs/add_a_model.md ---------------------------------------------------------------------

TINY = {
    "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "text_width": 32, "text_heads": 2, "text_layers": 1,
    "context_length": 8, "vocab_size": 64, "project_embed_dim": 16, "num_frames": 4,
}  # fmt: skip


@pytest.fixture
def timeconv():
    """The page's example, run; what it registers is gone after the test."""
    with registered_for_a_while():
        before = set(list_models())
        exec(code_blocks("add_a_model.md")[0], {})
        (name,) = set(list_models()) - before
        yield name


def inputs():
    return torch.randn(3, 3, 4, 32, 32), torch.randint(1, 64, (3, 8))


def test_the_example_has_at_most_30_lines():
    assert len(code_blocks("add_a_model.md")[0].strip().splitlines()) <= 30


def test_the_example_learns_in_its_own_mixer_too(timeconv):
    torch.manual_seed(1)  # three clips of noise are not always told apart in so few steps
    model = create_model(timeconv, **TINY, time_gate_init=0.5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0)
    video, tokens = inputs()

    def loss_fn(video_embed, text_embed, scale, batch):
        logits, labels = scale * video_embed @ text_embed.T, torch.arange(len(video_embed))
        both = torch.nn.functional.cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits.T, labels)
        return {"loss": sum(both) / 2}

    losses = []
    for _ in range(24):
        optimizer.zero_grad()
        batch = {"video": video, "tokens": tokens}
        losses.append(contrastive_step(model, [batch], loss_fn, Precision("cpu", torch.float32), lambda x: x)["loss"])
        optimizer.step()
    assert min(losses) < 0.7 * losses[0]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    for block in range(2):
        for part in ("depthwise.weight", "pointwise.weight"):
            assert f"visual.blocks.{block}.time_mixer.{part}" in changed
    assert len(time_gates(model)) == 2


def test_the_example_sees_the_order_of_frames_behind_open_gates_only(timeconv):
    video, _ = inputs()
    for gate, same in ((0.0, True), (0.5, False)):
        model = create_model(timeconv, **TINY, time_gate_init=gate).eval()
        with torch.no_grad():
            a, b = model.encode_image(video), model.encode_image(video.flip(2))
        assert torch.allclose(a, b, atol=1e-5) is same


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_example_goes_through_a_checkpoint(suffix, timeconv, tmp_path):
    model = create_model(timeconv, **TINY, time_gate_init=0.5, residual="frozen").eval()
    path = tmp_path / f"model{suffix}"
    save_weights(model, path, {"norm_style": "openai", "mean": [0.0] * 3, "std": [1.0] * 3})
    again = model_from_checkpoint(path).eval()
    assert again.config == model.config and again.config.mixer == "conv"
    fresh = create_model(timeconv, **TINY, residual="frozen").eval()
    assert not load_checkpoint(fresh, path).missing
    video, tokens = inputs()
    with torch.no_grad():
        expected = model(video, tokens)
        for other in (again, fresh):
            for a, b in zip(other(video, tokens), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_example_takes_long_videos_a_head_and_other_lengths(timeconv):
    model = create_model(timeconv, **TINY, time_gate_init=0.5).eval()
    video = torch.randn(1, 3, 11, 32, 32)
    with torch.no_grad():
        expected = model.encode_image(video)[0]
    found = encode_long_video(model, lambda a, b: video[0, :, a:b], 11, max_tokens=16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert VideoClassifier(model.visual, 0.1, 7, config=model.config)(video).shape == (1, 7)


def test_the_example_starts_from_an_image_clip(timeconv, tmp_path):
    """Of a made-up one: all but the temporal parts are in it."""
    source = create_model("TIMESFORMER_VITB16", **TINY)
    weights = {
        _to_clip(name): value.squeeze(0) if name == "visual.pos_embed" else value.flatten() if "cls" in name else value
        for name, value in source.state_dict().items()
        if not re.search("norm3|timeattn|temporal", name)
    }
    torch.save({"state_dict": weights}, tmp_path / "clip.pt")
    model = create_model(timeconv, **TINY)
    report = load_pretrained(model, "open_clip", str(tmp_path / "clip.pt"))
    assert report.missing and all(re.search("norm3|time_mixer|alpha", name) for name in report.missing)
    torch.testing.assert_close(model.visual.blocks[1].mlp.fc1.weight, source.visual.blocks[1].mlp.fc1.weight)


def _to_clip(name: str) -> str:
    for ours, theirs in (
        ("textual.", ""),
        ("visual.cls_token", "visual.class_embedding"),
        ("visual.image_projection", "visual.proj"),
        ("visual.pos_embed", "visual.positional_embedding"),
        ("visual.patch_embed.proj.", "visual.conv1."),
        ("visual.norm.", "visual.ln_post."),
        ("visual.blocks.", "visual.transformer.resblocks."),
        ("attn.Wqkv.", "attn.in_proj_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        name = name.replace(ours, theirs)
    return re.sub(r"(visual.*)\.norm([12])\.", r"\1.ln_\2.", name)


def test_the_example_is_trained_by_the_entry_point(timeconv):
    """Its name is a value of --model, its fields are --model-args."""
    args = parse(PretrainOptions, ["--model", timeconv, "--model-args", "depth=1"], "main_pretrain.py", "")
    assert args.model == timeconv


def test_the_example_is_imported_by_the_entry_point(tmp_path, monkeypatch):
    """As the page has it: a file timeconv.py in the current folder. test_plugins.py trains such a model."""
    (tmp_path / "timeconv.py").write_text(code_blocks("add_a_model.md")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with registered_for_a_while():
        words = ["--import", "timeconv", "--model", "TIMECONV_VITB16"]
        assert parse(PretrainOptions, words, "main_pretrain.py", "").plugins == ["timeconv"]
    del sys.modules["timeconv"]


def test_a_taken_mixer_is_refused(timeconv):
    for name in ("vim", "conv"):
        with pytest.raises(registry.UserError, match=f"mixer '{name}' is already taken"):
            registry.register_mixer(name, lambda config: None)


# --- docs/export.md --------------------------------------------------------------------------


def test_the_exported_files_run_as_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    monkeypatch.chdir(tmp_path)
    model = create_model("TIMEMAMBA_VITB16", **{**TINY, "vocab_size": 49408})
    save_weights(model, "checkpoint.pt", {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()})
    export, with_torch, with_onnx = code_blocks("export.md")
    exec(export, {})
    avion.weights.export_tower(model, "text.onnx", "text")
    names: dict = {}
    exec(with_torch, names)
    assert names["embedding"].shape == (1, 16)
    video = normalize_clip(names["frames"].to(torch.uint8), "openai")[None]
    with torch.no_grad():
        torch.testing.assert_close(names["embedding"], model.eval().encode_image(video), rtol=0, atol=1e-4)
    exec(with_onnx, names)
    tokens = tokenize(["opens the drawer", "cuts the onion"], context_length=8)
    wanted = model.encode_text(tokens).detach()
    torch.testing.assert_close(torch.from_numpy(names["embeddings"]), wanted, rtol=0, atol=1e-4)


# --- docs/troubleshooting.md -----------------------------------------------------------------


def quoted_messages(text: str) -> list[str]:
    """The messages of the page: what stands between the first pair of ticks of each item."""
    return re.findall(r"^- `+ ?(.+?) ?`+$", text, re.MULTILINE)


def message_templates(source: str) -> list[str]:
    """Every text in a source, "…" in the place of what is filled in."""
    found, inside = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in node.values)
            found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            found.append(re.sub(r"%(?:\.\d)?[sdgf]", "…", node.value))
    return found


def words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{3,}", text))


def matches(template: str, message: str) -> bool:
    """Whether the message is the template filled in, or at least a quarter of it is."""
    if words(template) < 2 or not all(part in message for part in template.split("…")):
        return False
    pattern = ".*".join(re.escape(part) for part in template.split("…"))
    if re.fullmatch(pattern, message):
        return True
    inside = re.search(rf"(?:: |, ){pattern}(?:$|; |: )", message)
    return inside is not None and words(template) >= max(4, words(message) / 4)


def all_templates() -> list[str]:
    return sorted({template for source in project_sources().values() for template in message_templates(source)})


def test_every_message_of_the_troubleshooting_page_is_one_of_the_project():
    messages = quoted_messages((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(messages) >= 25
    templates = all_templates()
    assert [m for m in messages if not any(matches(t, m) for t in templates)] == []


@pytest.mark.parametrize(
    "source, message, fits",
    [
        ('f"{p}: cannot be read ({e}); give a path"', "a.txt: cannot be read (No such file); give a path", True),
        ('f"{p}: cannot be read ({e}); give a path"', "a.txt: cannot be opened (No such file); give a path", False),
        ('("one line in "\n"two parts")', "one line in two parts", True),
        ('log("clip %s was replaced by %d", a, 2)', "clip a.mp4 was replaced by 3", True),
        ('f"{a}: {b} {c}"', "anything: at all goes", False),
    ],
)
def test_a_message_is_held_against_the_source(source, message, fits):
    assert any(matches(t, message) for t in message_templates(source)) is fits


# --- docs/architecture.md --------------------------------------------------------------------


def test_the_architecture_names_every_module():
    """Of every room and of tools/, in backticks; a folder within a room stands for its files."""
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+)(?:\.py)?/?`", (DOCS / "architecture.md").read_text(encoding="utf-8")))
    parts = [module.split(".") for module in project_sources()]
    modules = {p[2] for p in parts if p[0] == "avion" and len(p) > 2 and p[1] != "utils"}
    modules |= {p[1] for p in parts if p[0] in ("avion", "tools") and len(p) == 2}
    assert len(modules) > 90 and sorted(modules - named - {"__init__", "__main__"}) == []
