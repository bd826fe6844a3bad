"""Fine-tune a pretrained video-language model on EPIC-Kitchens-100 multi-instance retrieval, or evaluate one on it.

Examples:
    python main_finetune_retrieval.py --dataset demo --pretrain-model runs/demo/checkpoint.pt --output-dir runs/mir
    torchrun --nproc_per_node=8 main_finetune_retrieval.py --pretrain-model runs/id6/checkpoint.pt \\
        --batch-size 64 --grad-checkpointing --output-dir runs/id6_mir
"""

from collections.abc import Sequence

from avion.engine.options import FinetuneRetrievalOptions
from avion.engine.program import run_program


def run(options: FinetuneRetrievalOptions) -> None:
    """Train or evaluate with these options."""
    from avion.engine.run import train_or_evaluate
    from avion.engine.tasks.finetune_retrieval import FinetuneRetrieval

    train_or_evaluate(FinetuneRetrieval, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    return run_program(run, FinetuneRetrievalOptions, argv, "main_finetune_retrieval.py", __doc__)
