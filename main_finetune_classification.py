"""Fine-tune a pretrained video tower on EPIC-Kitchens-100 action recognition, or evaluate a fine-tuned one on it."""

import sys

from avion.commands.finetune_classification import main

if __name__ == "__main__":
    sys.exit(main())
