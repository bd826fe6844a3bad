"""Make the embedded demo dataset (docs/demo.md), or draw its contact sheet."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.make_demo_data import main

if __name__ == "__main__":
    sys.exit(main())
