"""Fine-tune a pretrained video tower on EPIC-Kitchens-100 action recognition, or evaluate a fine-tuned one on it.

Examples:
    python main_finetune_classification.py --dataset demo --pretrain-model runs/demo/checkpoint.pt --output-dir runs/cls
    torchrun --nproc_per_node=8 main_finetune_classification.py --pretrain-model runs/id6/checkpoint.pt \\
        --clip-stride 4 --batch-size 64 --wd 5e-4 --grad-checkpointing --output-dir runs/id6_cls
    python main_finetune_classification.py --evaluate --resume runs/id6_cls/checkpoint_best.pt \\
        --val-metadata EPIC_100_test_timestamps.csv --num-clips 5 --num-crops 3 --submission test.zip
"""

from collections.abc import Sequence

from avion.engine.options import FinetuneClassificationOptions
from avion.engine.program import run_program


def run(options: FinetuneClassificationOptions) -> None:
    """Train or evaluate with these options."""
    from avion.engine.run import train_or_evaluate
    from avion.engine.tasks.finetune_classification import FinetuneClassification

    train_or_evaluate(FinetuneClassification, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    return run_program(run, FinetuneClassificationOptions, argv, "main_finetune_classification.py", __doc__)
