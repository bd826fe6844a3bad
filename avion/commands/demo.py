"""Run all tasks on the embedded demo dataset, one after the other, and print metrics before and after each.

The tool pretrains (`main_pretrain.py`) from scratch on narrations of one action, and then on longer narrations too.
With the pretrained model it does retrieval fine-tuning, action recognition, EgoSchema and the zero-shot benchmarks.
Each task is run by its entry point with its recipe in `recipes/`. The tool draws the loss curve of the pretraining.

Verbs of the demo dataset come in pairs that are each other played backwards ("put", "take"), so a model that does not
see time cannot tell them apart. In the column "one frame", the same model sees only the middle frame of each clip.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from avion.engine.args import ToolParser
from avion.errors import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    parser = ToolParser(prog="tools/demo.py", doc=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="train each task for one epoch, to see that everything runs"
    )
    parser.add_argument(
        "--output-dir", default="runs/demo", help="folder of the runs, which is emptied first [%(default)s]"
    )
    parser.add_argument(
        "--root",
        default="datasets/demo",
        help="folder of the demo dataset, which is made where it is missing [%(default)s]",
    )
    given = parser.parse_args(argv)
    output = Path(given.output_dir)
    shutil.rmtree(output, ignore_errors=True)

    from . import demo_stages

    try:
        return exit_status("tools/demo.py", lambda: demo_stages.run_all(given.root, output, given.short))
    except demo_stages.Failed as e:
        return e.args[0]
