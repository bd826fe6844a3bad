"""Towers as programs that run without this project, compared with the models on other inputs than they were traced
with.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from avion.constants import NORM_STYLES
from avion.data.tokenizer import tokenize
from avion.data.transforms import EvalTransform
from avion.errors import UserError
from avion.models.clip import VideoClassifier
from avion.models.config import ModelConfig
from avion.models.registry import create_model, register_mixer, register_model
from avion.models.timemamba import build_divided
from avion.weights import export_tower, exporting
from avion.weights.hub import preprocess_of
from tests.models.registered import registered_for_a_while
from tests.models.tiny import DISTINCT_MODELS, TINY, tiny_inputs, tiny_model

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401
except ImportError:
    onnx = None
needs_onnx = pytest.mark.skipif(onnx is None, reason="needs onnx, onnxscript and onnxruntime (extra `export`)")
FORMATS = ["pt2", pytest.param("onnx", marks=needs_onnx)]
SIZES = [(1, 1), (1, 7), (4, 2), (5, 4)]  # clips and frames; programs are traced with (2, 3)
# Tracing takes a second per layer. The last layer of a video tower computes the CLS alone, so that every kind of tower
# is exported with two; a single layer is for what any layer shows.
ONE_LAYER = {"depth": 1, "text_layers": 1}


@pytest.fixture
def own_models():
    """Models and mixers that a test registers are gone after it."""
    with registered_for_a_while():
        yield


def ready(name, **overrides):
    torch.manual_seed(3)
    model = tiny_model(name, **overrides).eval()
    model.preprocess = preprocess_of("openai")
    return model


def outputs(path, *inputs):
    """What the file computes for each input, in this process."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return [program(x) for x in inputs]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]) for x in inputs]


RUN_ALONE = """
import sys
from pathlib import Path
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not installed here")
sys.meta_path.insert(0, Blocked())
import numpy as np
for file in sorted(Path({folder!r}).glob("*.{format}")):
    data = np.load(f"{{file}}.npz")
    {load}
    for i in range(int(data["count"])):
        found, wanted = run(data[f"in{{i}}"]), data[f"out{{i}}"]
        assert found.shape == wanted.shape and found.dtype == np.float32, (file.name, i)
        difference = abs(found - wanted).max()
        assert difference <= 1e-4, (file.name, i, difference)
    print(file.name)
assert not any(name.split(".")[0] in {blocked} for name in sys.modules)
"""
LOAD = {
    "pt2": "import torch; program = torch.export.load(file).module(); "
    "run = lambda x: program(torch.from_numpy(x)).numpy()",
    "onnx": "import onnxruntime; session = onnxruntime.InferenceSession(str(file)); "
    "name = session.get_inputs()[0].name; run = lambda x: session.run(None, {name: x})[0]",
}
BLOCKED = {"pt2": ["avion", "timm", "open_clip"], "onnx": ["avion", "torch"]}


def export_with_cases(model, path, tower):
    """Export one tower; beside it lie inputs of several sizes with what the model computes of them."""
    made = export_tower(model, path, tower)
    assert made.difference <= 1e-4
    cases = {}
    for i, (clips, frames) in enumerate(SIZES):
        video, tokens = tiny_inputs(clips, frames)
        with torch.no_grad():
            given = video if tower == "video" else tokens
            wanted = model.encode_image(video) if tower == "video" else model.encode_text(tokens)
        cases |= {f"in{i}": given.numpy(), f"out{i}": wanted.numpy()}
    np.savez(f"{path}.npz", count=len(SIZES), **cases)
    return made


def check_onnx(made, sizes, output):
    """The file is valid ONNX, names its sizes and needs nothing but ONNX's own operators."""
    proto = onnx.load(made.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == sizes
    assert proto.graph.output[0].name == output
    assert {o.version for o in proto.opset_import if not o.domain} == {made.facts["opset"]}
    assert all(not node.domain for node in proto.graph.node)


def text_tower(model):
    """What a text tower consists of; of LaViLa's models, which hold it themselves, the model."""
    return repr(getattr(model, "textual", model))


TRACED = {}  # by the name of the file without its suffix: both formats are written from the same trace


@pytest.mark.parametrize("format", FORMATS)
def test_every_tower_computes_the_same_in_a_process_without_this_project(format, tmp_path, monkeypatch):
    """One process runs all files, and checks each with its own inputs; ONNX files are valid and name their sizes."""
    trace = exporting.traced

    def traced_once(part, example, tower, path):
        name = Path(path).stem
        if name not in TRACED:
            TRACED[name] = trace(part, example, tower, path)
        return TRACED[name]

    monkeypatch.setattr(exporting, "traced", traced_once)
    texts = {}
    for name in DISTINCT_MODELS:
        model = ready(name)
        made = export_with_cases(model, tmp_path / f"{name}-video.{format}", "video")
        if format == "onnx":
            check_onnx(made, ["batch", 3, "frames", 32, 32], "video_embedding")
        texts.setdefault(text_tower(model), (name, model))  # several models have one and the same text tower
    for name, model in texts.values():
        made = export_with_cases(model, tmp_path / f"{name}-text.{format}", "text")
        if format == "onnx":
            check_onnx(made, ["batch", 16], "text_embedding")
    script = RUN_ALONE.format(folder=str(tmp_path), format=format, load=LOAD[format], blocked=BLOCKED[format])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [f"{name}-video.{format}" for name in DISTINCT_MODELS]
    files += [f"{name}-text.{format}" for name in ("CLIP_VITB16", "LAVILA_TSF_B16")]
    assert done.stdout.split() == sorted(files)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("LAVILA_TSF_B16", {"gated_time": True, "act_layer": "quick_gelu", **ONE_LAYER}),
        (
            "TIMEMAMBA_VITB16",
            {"ssm_expand": 2, "d_state": 5, "d_conv": 3, "use_fast_conv1": True, "img_size": 48, **ONE_LAYER},
        ),
        ("TIMESFORMER_VITB16", {"use_flash_attn": False, "num_frames": 2, "grad_checkpointing": True}),
        ("CLIP_VITB16", {"num_frames": 1, "drop_path_rate": 0.5, "patch_dropout": 0.5}),
    ],
)
def test_other_settings(name, overrides, format, tmp_path):
    model = ready(name, **overrides)
    path = tmp_path / f"video.{format}"
    export_tower(model.train(), path)
    video = tiny_inputs(3, 6, overrides.get("img_size", 32))[0]
    with torch.no_grad():
        torch.testing.assert_close(outputs(path, video)[0], model.eval().encode_image(video), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_a_classifier_gives_logits(format, tmp_path):
    towers = ready("TIMEMAMBA_FROZEN_VITT16", **ONE_LAYER)
    model = VideoClassifier(towers.visual, 0.5, 7, config=towers.config, actions=[f"{i}:{i}" for i in range(7)])
    nn.init.normal_(model.fc_cls.weight)
    model.preprocess = preprocess_of("timm")
    made = export_tower(model, tmp_path / f"a.{format}")
    assert made.facts["classes"][6] == "6:6" and made.facts["output"]["shape"] == ["batch", 7]
    video = tiny_inputs(1, 5)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            outputs(tmp_path / f"a.{format}", video)[0], model.eval()(video), rtol=1e-4, atol=1e-4
        )
    with pytest.raises(UserError, match="a classifier has no text tower"):
        export_tower(model, tmp_path / f"b.{format}", "text")


def graph_text(path):
    program = torch.export.load(path)
    return "\n".join(str(m.graph) for m in program.graph_module.modules() if hasattr(m, "graph"))


def test_the_program_does_not_depend_on_the_kernels_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "run_program", lambda *_: None)  # the graphs are compared, which takes no run
    attention = set()
    for flash in (None, True, False):  # two layers: of all tokens, and of the CLS alone
        export_tower(ready("TIMESFORMER_VITB16", use_flash_attn=flash), tmp_path / f"{flash}.pt2")
        attention.add(graph_text(tmp_path / f"{flash}.pt2"))
    assert len(attention) == 1
    graphs = {}
    for backend, flash in (("auto", None), ("torch", True), ("reference", False), ("triton", None)):
        model = ready("TIMEMAMBA_VITB16", scan_backend=backend, use_flash_attn=flash, **ONE_LAYER)
        export_tower(model, tmp_path / f"{backend}.pt2")
        graphs[backend] = graph_text(tmp_path / f"{backend}.pt2")
        assert model.visual.blocks[0].time_mamba.scan_backend == backend
    assert len(set(graphs.values())) == 1
    assert "avion" not in graphs["auto"] and graphs["auto"].count("higher_order.scan") == 2  # directions


def test_the_model_is_left_as_it_was(tmp_path):
    model = ready("TIMESFORMER_VITB16").train()
    before = copy.deepcopy(model.state_dict())
    export_tower(model, tmp_path / "a.pt2", "text")
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "visual" not in dict(torch.export.load(tmp_path / "a.pt2").module().named_parameters())
    size = sum(p.numel() for n, p in model.named_parameters() if n.startswith("textual."))
    assert sum(p.numel() for p in torch.export.load(tmp_path / "a.pt2").state_dict.values()) == size


def test_the_facts_say_how_to_make_the_input(tmp_path):
    """A clip and texts prepared from the JSON file alone, with torchvision and open_clip, are this project's."""
    model = ready("CLIP_VITB16", context_length=9, vocab_size=49408, **ONE_LAYER)
    model.preprocess = preprocess_of("openai_legacy")
    export_tower(model, tmp_path / "video.pt2")
    facts = json.loads((tmp_path / "video.pt2.json").read_text())
    assert facts["input"] == {"name": "video", "dtype": "float32", "shape": ["batch", 3, "frames", 32, 32]}
    assert facts["output"]["shape"] == ["batch", 16] and facts["output"]["unit_length"] is False
    assert facts["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    told = facts["preprocessing"]
    assert (told["mean"], told["std"]) == tuple(map(list, NORM_STYLES["openai_legacy"])) and told["trained_frames"] == 4

    from torchvision.transforms import v2

    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    size = facts["input"]["shape"][-1]
    clip = v2.CenterCrop(size)(v2.Resize(size, antialias=True)(torch.from_numpy(frames).permute(0, 3, 1, 2).float()))
    clip = v2.Normalize(told["mean"], told["std"])(clip).permute(1, 0, 2, 3)[None]
    wanted = EvalTransform(size, norm_style="openai_legacy")(frames, None)[None]
    torch.testing.assert_close(clip, wanted, rtol=0, atol=1e-4)

    export_tower(model, tmp_path / "text.pt2", "text")
    facts = json.loads((tmp_path / "text.pt2.json").read_text())
    assert facts["input"] == {"name": "tokens", "dtype": "int64", "shape": ["batch", 9]}
    from open_clip.tokenizer import SimpleTokenizer

    texts = ["opens the drawer", " ".join(["cuts the onion"] * 9)]
    tokens = SimpleTokenizer(context_length=facts["tokenizer"]["context_length"])(texts)
    assert torch.equal(tokens, tokenize(texts, context_length=9))
    ends = facts["tokenizer"]
    assert (tokens[:, 0] == ends["start_of_text"]).all() and (tokens.amax(1) == ends["end_of_text"]).all()
    assert tokens[1, -1] == ends["end_of_text"] and tokens[0, -1] == ends["padding"]


class Mixer(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@torch.library.custom_op("avion_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return x * 2


def with_mixer(f):
    register_mixer("own", lambda config: Mixer(f))
    register_model(ModelConfig("OWN", "divided", mixer="own"), build_divided)
    model = create_model("OWN", **{**TINY, **ONE_LAYER}, time_gate_init=1.0)
    model.preprocess = preprocess_of("openai")
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_a_mixer_of_ones_own(format, own_models, tmp_path):
    model = with_mixer(lambda x: x.cumsum(1).tanh()).eval()
    export_tower(model, tmp_path / f"a.{format}")
    video = tiny_inputs(1, 8)[0]
    with torch.no_grad():
        found = outputs(tmp_path / f"a.{format}", video)[0]
        torch.testing.assert_close(found, model.encode_image(video), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "mixer, suffix, says",
    [
        (
            lambda x: double(x),
            "pt2",
            "the model calls avion_test.double.default, which only programs that import its package have",
        ),
        (lambda x: x * float(x.sum()), "pt2", "torch.export cannot follow the video tower: "),
        (lambda x: x[:, : x.shape[1] // 2].repeat(1, 2, 1), "pt2", "torch.export cannot follow the video tower: "),
        pytest.param(torch.special.bessel_j0, "onnx", "ONNX cannot express the model: ", marks=needs_onnx),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(mixer, suffix, says, own_models, tmp_path, capfd):
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(UserError) as refused:
        export_tower(with_mixer(mixer), path)
    text = str(refused.value)
    assert text.startswith(f"{path}: {says}") and "\n" not in text and len(text) < 700
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
    if suffix == "onnx":
        assert "bessel_j0" in text and text.endswith("write a .pt2 file")


def test_a_model_that_cannot_be_copied_is_said_in_one_line(own_models, tmp_path):
    with pytest.raises(UserError, match="the model cannot be copied: cannot pickle 'generator' object"):
        export_tower(with_mixer(iter(i for i in range(3))), tmp_path / "a.pt2")


def test_what_export_tower_is_not_for(tmp_path, monkeypatch):
    model = ready("CLIP_VITB16")
    for name, format, says in (
        ("a.pt", None, r"suffix '\.pt', expected \.pt2 or \.onnx"),
        ("a.onnx", "pt2", r"suffix '\.onnx', expected \.pt2"),
    ):
        with pytest.raises(UserError, match=says):
            export_tower(model, tmp_path / name, format=format)
    with pytest.raises(UserError, match="tower 'audio': expected one of video, text"):
        export_tower(model, tmp_path / "a.pt2", "audio")
    with monkeypatch.context() as patch:
        patch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"needs the packages onnx and onnxscript; `pip install"):
            export_tower(model, tmp_path / "a.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "TOLERANCE", -1.0)
        with pytest.raises(UserError, match="the exported program differs from the model by .*; it is not written"):
            export_tower(model, tmp_path / "a.pt2")
    model.preprocess = None
    with pytest.raises(UserError, match="the model does not know how its input is normalised"):
        export_tower(model, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_without_onnxruntime_the_file_is_written_and_not_compared(tmp_path, monkeypatch):
    find = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else find(n))
    made = export_tower(ready("CLIP_VITB16", **ONE_LAYER), tmp_path / "a.onnx", "text")
    assert made.difference is None and (tmp_path / "a.onnx").is_file()


@needs_onnx
def test_more_than_an_onnx_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "ONNX_BYTES", 1000)
    with pytest.raises(UserError, match="GB of weights, and an ONNX file holds 2 GB; write a .pt2 file"):
        export_tower(ready("CLIP_VITB16"), tmp_path / "a.onnx")


def test_the_last_cause_is_told():
    try:
        try:
            raise ValueError("\x1b[31mthe cause\x1b[0m\nmore of it")
        except ValueError as e:
            raise RuntimeError("a report\nof many lines") from e
    except RuntimeError as error:
        assert exporting.last_cause(error) == "the cause"
    assert exporting.last_cause(KeyError()) == "KeyError"
