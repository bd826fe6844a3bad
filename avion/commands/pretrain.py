"""Pretrain a video-language model on narrated clips and evaluate it on EPIC-Kitchens-100 retrieval, zero-shot.

Examples:
    python main_pretrain.py --dataset demo --model TIMEMAMBA_VITT16
    torchrun --nproc_per_node=8 main_pretrain.py --model TIMEMAMBA_VITB16 --output-dir runs/id6
"""

from collections.abc import Sequence

from avion.engine.options import PretrainOptions
from avion.engine.program import run_program


def run(options: PretrainOptions) -> None:
    """Train or evaluate with these options."""
    from avion.engine.run import train_or_evaluate
    from avion.engine.tasks.pretrain import Pretrain

    train_or_evaluate(Pretrain, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    return run_program(run, PretrainOptions, argv, "main_pretrain.py", __doc__)
