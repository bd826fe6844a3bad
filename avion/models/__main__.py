"""List the registered models with their numbers of parameters, or describe a checkpoint.

The list is read from `listing.json`, beside this file, because building the models takes seconds. After a change of the
models, `python -m avion.models --update-listing` writes the list anew.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from avion.errors import UserError, exit_status
from avion.files import write_text
from avion.plugins import import_plugins

LISTING = Path(__file__).with_name("listing.json")
HF_PREFIX = "hf:"


def listing() -> dict[str, dict[str, Any]]:
    """Return the content of `listing.json`.

    Returns:
        For each model, by its name: `video`, `text` and `total`, numbers of parameters, and `aliases`, the names of
            upstream's programs for the model. The projections into the shared embedding count with their tower; the
            temperature counts with the total only.
    """
    return json.loads(LISTING.read_text(encoding="utf-8"))


def registered() -> dict[str, dict[str, Any]]:
    """Return what `listing` returns, computed from the registry and the models, without memory for weights."""
    from .registry import list_models, model_aliases

    return {name: {**parameter_counts(name), "aliases": model_aliases(name)} for name in list_models()}


def parameter_counts(name: str) -> dict[str, int]:
    """Return the numbers of parameters of a model, built on the meta device: `video`, `text` and `total`."""
    import torch

    from .registry import create_model

    with torch.device("meta"):
        model = create_model(name)
    counts = dict.fromkeys(("video", "text", "total"), 0)
    for key, parameter in model.named_parameters():
        counts["total"] += parameter.numel()
        if key.startswith("visual.") or key == "image_projection":
            counts["video"] += parameter.numel()
        elif key != "logit_scale":
            counts["text"] += parameter.numel()
    return counts


def table(models: dict[str, dict[str, Any]]) -> str:
    """Return a line per model, under a head."""
    width = max(map(len, models))
    lines = [f"{'model':<{width}}  {'video tower':>13}  {'text tower':>13}  {'total':>13}  upstream names"]
    for name, facts in models.items():
        counts = "".join(f"  {facts[key]:>13,}" for key in ("video", "text", "total"))
        lines.append(f"{name:<{width}}{counts}  {', '.join(facts['aliases'])}".rstrip())
    return "\n".join(lines)


def update_listing() -> str:
    """Write `listing.json` anew, and return what was done, for the screen."""
    models = registered()
    lines = [f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in models.items()]
    write_text(LISTING, "{\n" + ",\n".join(lines) + "\n}\n")
    return f"{LISTING}: {len(models)} models"


def build_parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m avion.models", description=summary, epilog=more)
    parser.add_argument(
        "what",
        nargs="?",
        default="*",
        metavar="PATTERN | CHECKPOINT",
        help="a shell pattern of model names such as 'TIMEMAMBA*', or a checkpoint to describe: a path or "
        "hf:owner/repo/file",
    )
    parser.add_argument(
        "--import",
        dest="plugins",
        action="append",
        default=[],
        metavar="MODULE",
        help="module, or path of a .py file, to import first, which registers models and mixers; may be repeated; the "
        "models are then counted anew, which takes seconds",
    )
    parser.add_argument("--update-listing", action="store_true", help="write the list of models anew, for developers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`), and return the exit status."""
    parser = build_parser()

    def body() -> None:
        given = parser.parse_args(argv)
        import_plugins(given.plugins)
        if given.update_listing:
            print(update_listing())
        elif given.what.startswith(HF_PREFIX) or Path(given.what).is_file():
            from . import Checkpoint

            print(Checkpoint.open(given.what).describe())
        else:
            models = registered() if given.plugins else listing()
            found = {name: facts for name, facts in models.items() if fnmatchcase(name, given.what)}
            if not found:
                raise UserError(
                    f"{given.what}: no registered model has a name of this kind, and there is no file of this name; "
                    "`python -m avion.models` lists all models"
                )
            print(table(found))

    return exit_status(parser.prog, body)


if __name__ == "__main__":
    sys.exit(main())
