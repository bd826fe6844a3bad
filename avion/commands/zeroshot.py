"""Evaluate any checkpoint of a video-language model on benchmarks that it was not trained for.

Examples:
    python main_zeroshot.py --dataset egtea egomcq --demo-root datasets/demo --pretrain-model runs/demo/checkpoint.pt
    torchrun --nproc_per_node=8 main_zeroshot.py --dataset ek100_mir ek100_cls egtea charades_ego egomcq \\
        --pretrain-model runs/id6/checkpoint.pt --output-dir runs/id6_zeroshot
"""

from collections.abc import Sequence

from avion.engine.options import ZeroShotOptions
from avion.engine.program import run_program


def run(options: ZeroShotOptions) -> None:
    """Run the benchmarks with these options."""
    from avion.engine.zeroshot.evaluate import run_zeroshot

    run_zeroshot(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    return run_program(run, ZeroShotOptions, argv, "main_zeroshot.py", __doc__)
