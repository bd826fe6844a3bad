"""`python -m avion.models [PATTERN]`: the registered models with their parameter counts."""

import argparse

import torch

from . import create_model, list_models
from .registry import model_aliases


def parameter_counts(name: str) -> tuple[int, int, int]:
    """(video tower, text tower, the whole model), without spending memory on weights.

    Projections into the shared embedding count with their tower.
    """
    with torch.device("meta"):
        model = create_model(name)
    video = text = total = 0
    for key, parameter in model.named_parameters():
        total += parameter.numel()
        if key.startswith("visual.") or key == "image_projection":
            video += parameter.numel()
        elif key != "logit_scale":
            text += parameter.numel()
    return video, text, total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m avion.models", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'TIMEMAMBA*'")
    pattern = parser.parse_args(argv).pattern
    names = list_models(pattern)
    if not names:
        parser.error(f"no model matches {pattern!r}")
    width = max(map(len, names))
    print(f"{'model':<{width}}  {'video tower':>13}  {'text tower':>13}  {'total':>13}  upstream names")
    for name in names:
        counts = "".join(f"  {count:>13,}" for count in parameter_counts(name))
        print(f"{name:<{width}}{counts}  {', '.join(model_aliases(name))}".rstrip())


if __name__ == "__main__":
    main()
