"""Fine-tune a pretrained video-language model on EPIC-Kitchens-100 multi-instance retrieval, or evaluate one on it."""

import sys

from avion.commands.finetune_retrieval import main

if __name__ == "__main__":
    sys.exit(main())
