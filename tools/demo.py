"""Run all tasks on the embedded demo dataset, one after the other, and print metrics before and after each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
