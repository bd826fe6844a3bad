"""Write one tower of a checkpoint as a program that runs without this project: torch.export (.pt2) or ONNX (.onnx).

Examples:
    python tools/export_model.py checkpoint.pt video.pt2
    python tools/export_model.py checkpoint.pt text.onnx --tower text

The program takes any number of clips or texts and any number of frames. The file TARGET.json beside it says what goes
in and what comes out. docs/export.md shows how to run both.
"""

import argparse
from collections.abc import Sequence

from avion.constants import NORM_STYLES
from avion.engine.args import ToolParser
from avion.errors import UserError, exit_status, say
from avion.targets import check_target


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="tools/export_model.py", doc=__doc__)
    parser.add_argument("checkpoint", help="checkpoint to read: a path or hf:owner/repo/file")
    parser.add_argument("target", help="file to write, .pt2 or .onnx; TARGET.json is written beside it")
    parser.add_argument(
        "--tower",
        choices=["video", "text"],
        default="video",
        help="which tower; the video tower of a classifier gives logits [video]",
    )
    parser.add_argument("--format", choices=["pt2", "onnx"], help="format of the target [by its suffix]")
    parser.add_argument("--model", metavar="NAME", help="name of the checkpoint's model, if the file does not state it")
    parser.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of the model that no shape shows (num_heads=4), or another image size (img_size=256)",
    )
    parser.add_argument(
        "--norm-style", choices=sorted(NORM_STYLES), help="normalisation of the training, if the file does not state it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing target files")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def export(args: argparse.Namespace) -> str:
    """Write `args.target`; returns what was done, for the screen."""
    from avion.engine.options.model_args import parse_model_args
    from avion.weights import Checkpoint, export_tower
    from avion.weights.exporting import check_format, facts_path

    check_format(args.target, args.format)
    for target in (args.target, facts_path(args.target)):
        check_target(target, "target", overwrite=args.overwrite, inputs=[args.checkpoint])
    fields = parse_model_args(args.model_args, args.model)
    checkpoint = Checkpoint.open(args.checkpoint)
    facts = checkpoint.facts
    style = args.norm_style or facts.norm_style
    if style is None and args.tower == "video":
        raise UserError(f"{args.checkpoint}: does not say how its input was normalised: give --norm-style")
    if args.norm_style is not None:
        checkpoint.check_norm_style(args.norm_style)
    build = checkpoint.build_classifier if checkpoint.is_classifier else checkpoint.build
    model = build(name=args.model, **fields)
    if style is not None:
        mean, std = (facts.mean, facts.std) if facts.mean is not None else NORM_STYLES[style]
        model.preprocess = {"norm_style": style, "mean": mean, "std": std}
    made = export_tower(model, args.target, args.tower, format=args.format)
    given, returned = (
        f"{part['name']} ({', '.join(map(str, part['shape']))}) {part['dtype']}"
        for part in (made.facts["input"], made.facts["output"])
    )
    compared = (
        "not compared with the model, because onnxruntime is not installed"
        if made.difference is None
        else f"differs from the model by at most {made.difference:.1g} on another input"
    )
    return (
        f"{model.load_report}\n{args.target}: {args.tower} tower of {model.config.name}, {given} -> {returned}; "
        f"{compared}\n{facts_path(args.target)}: what goes in and what comes out"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_status("tools/export_model.py", lambda: say(*export(args).split("\n")), debug=args.debug)
