"""Rewrite any readable checkpoint in this project's format: its names of weights, with config and preprocessing.

Examples:
    python tools/convert_checkpoint.py hf:cg1177/video-mamba-suite/clip_timemamba_vanilla_base_ego4d4m_bs512_f4.pt \\
        timemamba.safetensors
    python tools/convert_checkpoint.py runs/id6_cls/checkpoint_best.pt folder/

A target without a suffix is a folder, which gets config.json, model.safetensors and a card, as `save_pretrained` writes
them. Classifiers are converted too. The new file describes itself: `model_from_checkpoint` reads the model's sizes,
heads, activation and normalisation from it. The optimizer state is not copied.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from avion.constants import NORM_STYLES
from avion.engine.args import ToolParser
from avion.errors import UserError, exit_status, say
from avion.targets import check_target


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/convert_checkpoint.py", doc=__doc__)
    parser.add_argument("source", help="checkpoint to read: a path or hf:owner/repo/file")
    parser.add_argument("target", help="file to write, .safetensors or .pt, or a folder")
    parser.add_argument("--model", metavar="NAME", help="name of the checkpoint's model, if the file does not state it")
    parser.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of the model that no shape shows (num_heads=4), or another number of frames or image size",
    )
    parser.add_argument(
        "--norm-style", choices=sorted(NORM_STYLES), help="normalisation of the training, if the file does not state it"
    )
    parser.add_argument("--overwrite", "--force", action="store_true", help="replace an existing target file")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def convert(args: argparse.Namespace) -> str:
    """Write `args.target`.

    Args:
        args: The parsed flags.

    Returns:
        What was done, for the screen.

    Raises:
        UserError: The source cannot be read or does not say enough, or the target cannot be written.
    """
    from avion.engine.options.model_args import parse_model_args
    from avion.weights import Checkpoint, save_weights
    from avion.weights.hub import WEIGHTS

    as_folder = not Path(args.target).suffix
    written = Path(args.target) / WEIGHTS if as_folder else Path(args.target)
    check_target(written, "target", overwrite=args.overwrite, inputs=[args.source], make_folder=as_folder)
    fields = parse_model_args(args.model_args, args.model)
    checkpoint = Checkpoint.open(args.source)
    facts = checkpoint.facts
    style = args.norm_style or facts.norm_style
    if style is None:
        raise UserError(f"{args.source}: does not say how its input was normalised: give --norm-style")
    if args.norm_style is not None:
        checkpoint.check_norm_style(args.norm_style)
    known = facts.mean is not None
    mean, std = (facts.mean, facts.std) if known else NORM_STYLES[style]
    build = checkpoint.build_classifier if checkpoint.is_classifier else checkpoint.build
    model = build(name=args.model, **fields)
    model.preprocess = {"norm_style": style, "mean": mean, "std": std}
    if as_folder:
        model.save_pretrained(args.target)
    else:
        save_weights(model, args.target, model.preprocess)
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{model.load_report}\n{args.target}: {model.config.name}, {count:,} parameters, "
        f"{model.config.num_frames} frames of {model.config.img_size} px, {model.config.act_layer}, "
        f"--norm-style {style}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status("tools/convert_checkpoint.py", lambda: say(*convert(args).split("\n", 1)), debug=args.debug)
