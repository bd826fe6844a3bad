"""Pretrain a video-language model on narrated clips and evaluate it on EPIC-Kitchens-100 retrieval, zero-shot.

Examples:
    python main_pretrain.py --dataset demo --model TIMEMAMBA_VITT16
    torchrun --nproc_per_node=8 main_pretrain.py --model TIMEMAMBA_VITB16 --output-dir runs/id6
"""

import sys
from collections.abc import Sequence

from avion.engine.options import PretrainOptions
from avion.engine.program import later, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    body = later("avion.engine.run:train_or_evaluate", "avion.engine.tasks.pretrain:Pretrain")
    return run_program(body, PretrainOptions, argv, "main_pretrain.py", __doc__)


if __name__ == "__main__":
    sys.exit(main())
