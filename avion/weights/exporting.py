"""Towers as files that run without this project: programs of `torch.export` (.pt2) and ONNX (.onnx).

A program takes any number of clips, and any number of frames. Beside it lies a JSON file with what its user must know:
the shapes, the normalisation of the video, the tokens of the texts, the classes of a classifier.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from avion.errors import UserError
from avion.files import write_text, written_whole
from avion.models.clip import VideoClassifier

from .loading import unwrap
from .saving import plain_preprocess

FORMATS = {"pt2": ".pt2", "onnx": ".onnx"}
TOWERS = ("video", "text")
TOLERANCE = 1e-4  # of the largest value of the output, where that is above 1
ONNX_BYTES = 2**31 - 2**20  # protobuf's limit, with room for the graph
_WITHOUT = {  # what each tower does not need; LaViLa's model itself holds the parts of its text tower
    "video": ("textual", "token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"),
    "text": ("visual", "image_projection"),
}
_OPSET = 20


class Exported(NamedTuple):
    """What was exported.

    Attributes:
        path: The file of the program.
        facts: What the JSON file beside it holds.
        difference: The largest difference to the model on an input of another size than the program was traced with;
            None where nothing here can run the file.
    """

    path: Path
    facts: dict[str, Any]
    difference: float | None


class _Video(nn.Module):
    """(B, C, T, height, width) → (B, E), or logits (B, classes)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> Tensor:
        return self.model(video) if isinstance(self.model, VideoClassifier) else self.model.encode_image(video)


class _Text(nn.Module):
    """(B, L) → (B, E)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def facts_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of the JSON file that lies beside an exported program."""
    return Path(f"{os.fspath(path)}.json")


def check_format(path: str | os.PathLike[str], format: str | None = None) -> str:
    """Return the format in which a file is to be written, by its name.

    Args:
        path: The file.
        format: "pt2" or "onnx"; None: the suffix of the file decides.

    Raises:
        UserError: The suffix is of another format or of none, or the packages that write ONNX are missing.
    """
    suffix = Path(path).suffix
    found = next((name for name, own in FORMATS.items() if own == suffix), None)
    if found is None or (format is not None and found != format):
        wanted = FORMATS[format] if format is not None else " or ".join(FORMATS.values())
        raise UserError(f"{os.fspath(path)}: suffix {suffix!r}, expected {wanted}")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if found == "onnx" and missing:
        raise UserError(
            f"{os.fspath(path)}: ONNX needs the packages onnx and onnxscript; "
            "`pip install 'avion-timemamba[export]'` mends it"
        )
    return found


def export_tower(
    model: nn.Module, path: str | os.PathLike[str], tower: str = "video", *, format: str | None = None
) -> Exported:
    """Write one tower of a model as a program that runs without this project, and the facts beside it.

    The program computes `encode_image`, `encode_text`, or the logits of a classifier, in float32 and evaluation mode.
    It takes any number of clips or texts, and any number of frames. Height, width and the number of tokens are fixed.
    No kernel of this machine is in it: the scans of Mamba models are loops of PyTorch or ONNX. The program is run on an
    input of another size and compared with the model before it is written, if a package is here that runs it.

    Args:
        model: A two-tower model or a classifier, on any device; it is not changed.
        path: The file, .pt2 or .onnx. The JSON file is called `{path}.json`. Both are replaced where they exist.
        tower: "video" or "text".
        format: "pt2" or "onnx"; None: the suffix of the file decides.

    Returns:
        What was written.

    Raises:
        UserError: The suffix is another one, the model has no such tower or does not say how its input is normalised,
            the model cannot be exported, or the file does not compute what the model computes.
    """
    model = unwrap(model)
    format = check_format(path, format)
    facts = {"format": format, **_facts(model, tower, os.fspath(path))}
    part = _part(model, tower, os.fspath(path))
    example, other = (_inputs(facts, clips, frames) for clips, frames in ((2, 3), (3, 5)))
    with _quiet():
        program = traced(part, example, tower, os.fspath(path))
        _check_operators(program, os.fspath(path))
        content = _as_pt2(program) if format == "pt2" else _as_onnx(program, part, facts, os.fspath(path))
    found = run_program(content, format, other, os.fspath(path))
    difference = None if found is None else _compare(found, part(other), os.fspath(path))
    with written_whole(path, cure="give another target") as file:
        file.write(content)
    write_text(facts_path(path), json.dumps(facts, indent=2) + "\n")
    return Exported(Path(path), facts, difference)


# ---- tracing ---------------------------------------------------------------------------------------------


def _part(model: nn.Module, tower: str, path: str) -> nn.Module:
    """A copy of one tower on the CPU, in float32 and in evaluation mode, that takes no gradients."""
    shell = copy.copy(model)
    shell._modules, shell._parameters = dict(model._modules), dict(model._parameters)
    for name in (*_WITHOUT[tower], "logit_scale"):
        shell._modules.pop(name, None)
        shell._parameters.pop(name, None)
    part = _Video(shell) if tower == "video" else _Text(shell)
    try:
        copied = copy.deepcopy(part)
    except TypeError as e:  # a module of one's own that holds an open file, a generator and so on
        raise UserError(f"{path}: the model cannot be copied: {last_cause(e)}") from e
    for module in copied.modules():  # kernels that were chosen for another machine
        for choice, anywhere in (("scan_backend", "auto"), ("use_flash", None)):
            if hasattr(module, choice):
                setattr(module, choice, anywhere)
    return copied.cpu().float().eval().requires_grad_(False)


def _inputs(facts: dict[str, Any], clips: int, frames: int) -> Tensor:
    """Random input of a program: (clips, C, frames, height, width), or (clips, L) with the end of text at the end."""
    shape = [{"batch": clips, "frames": frames}.get(size, size) for size in facts["input"]["shape"]]
    generator = torch.Generator().manual_seed(clips)
    if facts["tower"] == "video":
        return torch.randn(shape, generator=generator)
    ends = facts["tokenizer"]["end_of_text"]
    tokens = torch.randint(1, ends, shape, generator=generator)
    tokens[:, -1] = ends
    return tokens


def traced(part: nn.Module, example: Tensor, tower: str, path: str) -> torch.export.ExportedProgram:
    """Trace a tower for any number of clips, and of frames of the video tower.

    Args:
        part: The module to be traced.
        example: An input of the module.
        tower: "video" or "text".
        path: The file that is to be written, for messages.

    Returns:
        The program.

    Raises:
        UserError: torch.export cannot follow the module.
    """
    sizes = {0: torch.export.Dim("batch", min=1)}
    if tower == "video":
        sizes[2] = torch.export.Dim("frames", min=1)
    try:
        with torch.no_grad():
            return torch.export.export(part, (example,), dynamic_shapes=(sizes,), strict=False)
    except Exception as e:  # whatever a module of one's own does that torch.export cannot follow
        raise UserError(f"{path}: torch.export cannot follow the {tower} tower: {last_cause(e)}") from e


def _check_operators(program: torch.export.ExportedProgram, path: str) -> None:
    """Raise UserError where the program calls operators that PyTorch does not bring."""
    foreign = set()
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            space = getattr(node.target, "namespace", None) if node.op == "call_function" else None
            if space not in (None, "aten", "prim", "higher_order"):
                foreign.add(str(node.target))
    if foreign:
        raise UserError(
            f"{path}: the model calls {', '.join(sorted(foreign))}, which only programs that import its package have; "
            "it needs a plain PyTorch form for export"
        )


def _as_pt2(program: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _as_onnx(program: torch.export.ExportedProgram, part: nn.Module, facts: dict[str, Any], path: str) -> bytes:
    size = sum(value.numel() * value.element_size() for value in part.state_dict().values())
    if size > ONNX_BYTES:
        raise UserError(f"{path}: {size / 1e9:.1f} GB of weights, and an ONNX file holds 2 GB; write a .pt2 file")
    given, returned = facts["input"], facts["output"]
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=[given["name"]],
            output_names=[returned["name"]],
            verbose=False,
        )
        assert made is not None
        proto = made.model_proto
    except Exception as e:  # an operator that has no form in ONNX
        raise UserError(f"{path}: ONNX cannot express the model: {last_cause(e)}; write a .pt2 file") from e
    del proto.graph.value_info[:]  # sizes by PyTorch's names for them
    for value, wanted in ((proto.graph.input[0], given), (proto.graph.output[0], returned)):
        for dim, size in zip(value.type.tensor_type.shape.dim, wanted["shape"], strict=True):
            if isinstance(size, str):
                dim.dim_param = size
    facts["opset"] = _OPSET
    return proto.SerializeToString()


def last_cause(error: Exception) -> str:
    """Return in one line what went wrong: the last cause, which converters wrap in reports of many lines."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports, graphs and warnings that PyTorch prints: what goes wrong is raised, and told in one line."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
    finally:
        logging.disable(before)


# ---- comparing -------------------------------------------------------------------------------------------


def run_program(content: bytes, format: str, inputs: Tensor, path: str) -> Tensor | None:
    """Run an exported program.

    Args:
        content: The content of the file.
        format: "pt2" or "onnx".
        inputs: The input, (B, …).
        path: The file, for messages.

    Returns:
        The output; None where onnxruntime is not installed.
    """
    if format == "pt2":
        with torch.no_grad():
            return torch.export.load(io.BytesIO(content)).module()(inputs)
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    except Exception as e:  # what PyTorch made of the model is no ONNX that onnxruntime knows
        raise UserError(f"{path}: onnxruntime cannot run the model: {last_cause(e)}; write a .pt2 file") from e


@torch.no_grad()
def _compare(found: Tensor, wanted: Tensor, path: str) -> float:
    difference = float((found - wanted).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise UserError(f"{path}: the exported program differs from the model by {difference:.2g}; it is not written")
    return difference


# ---- facts -----------------------------------------------------------------------------------------------


def _facts(model: nn.Module, tower: str, path: str) -> dict[str, Any]:
    """What a user of the program must know, in the types of JSON."""
    if tower not in TOWERS:
        raise UserError(f"tower {tower!r}: expected one of {', '.join(TOWERS)}")
    classifier = isinstance(model, VideoClassifier)
    if classifier and tower == "text":
        raise UserError(f"{path}: a classifier has no text tower; export its video tower")
    config = model.config
    width = model.fc_cls.out_features if classifier else config.project_embed_dim
    facts: dict[str, Any] = {
        "tower": tower,
        "model": config.name,
        "torch": torch.__version__,
        "output": {
            "name": "logits" if classifier else f"{tower}_embedding",
            "dtype": "float32",
            "shape": ["batch", width],
            "unit_length": False,
        },
    }
    if not classifier:
        facts["logit_scale"] = math.exp(model.logit_scale.item())
    return facts | (_video_facts(model, path) if tower == "video" else _text_facts(config))


def _video_facts(model: nn.Module, path: str) -> dict[str, Any]:
    config, preprocess = model.config, getattr(model, "preprocess", None)
    if preprocess is None:
        raise UserError(f"{path}: the model does not know how its input is normalised; set model.preprocess")
    facts: dict[str, Any] = {
        "input": {
            "name": "video",
            "dtype": "float32",
            "shape": ["batch", config.in_chans, "frames", config.img_size, config.img_size],
        },
        "preprocessing": {
            "frames": f"RGB; trained with {config.num_frames}, the middles of so many equal segments of the clip",
            "trained_frames": config.num_frames,
            "resize": f"shorter side to {config.img_size} px, bilinear with antialiasing",
            "crop": f"centre, {config.img_size} x {config.img_size} px",
            "pixels": "(value - mean) / std, of values from 0 to 255",
            **plain_preprocess(preprocess, path),
        },
    }
    if isinstance(model, VideoClassifier):
        facts["classes"] = None if model.actions is None else list(model.actions)
    return facts


def _text_facts(config: Any) -> dict[str, Any]:
    size = config.vocab_size
    clip = 49408
    return {
        "input": {"name": "tokens", "dtype": "int64", "shape": ["batch", config.context_length]},
        "tokenizer": {
            "name": "CLIP's byte-pair encoding (open_clip.SimpleTokenizer, openai/clip-vit-base-patch16)",
            "context_length": config.context_length,
            "vocab_size": size,
            "start_of_text": min(size, clip) - 2,
            "end_of_text": min(size, clip) - 1,
            "padding": 0,
            "too_long": "cut off, with the end of text as the last token",
            "ids": "as they are" if size >= clip else f"of words modulo {size - 2}; start and end are the two largest",
        },
    }
