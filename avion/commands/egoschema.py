"""Answer EgoSchema's questions about long videos, zero-shot, from any checkpoint of a video-language model.

Examples:
    python main_egoschema.py --dataset demo --pretrain-model runs/demo/checkpoint.pt --frames 16 32 64
    torchrun --nproc_per_node=8 main_egoschema.py --pretrain-model runs/id6/checkpoint.pt \\
        --answers datasets/EgoSchema/subset_answers.json --frames 16 32 64 128 256 512 1024 2048 4096 8192
"""

from collections.abc import Sequence

from avion.engine.options import EgoSchemaOptions
from avion.engine.program import run_program


def run(options: EgoSchemaOptions) -> None:
    """Answer the questions with these options."""
    from avion.engine.egoschema.evaluate import run_egoschema

    run_egoschema(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    return run_program(run, EgoSchemaOptions, argv, "main_egoschema.py", __doc__)
