"""Pretrain a video-language model on narrated clips and evaluate it on EPIC-Kitchens-100 retrieval, zero-shot."""

import sys

from avion.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
