"""Rewrite any readable checkpoint in this project's format: its names of weights, with config and preprocessing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
