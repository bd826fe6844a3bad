"""Run all recipes of the paper's tables, scaled down, on the demo dataset, and report on the results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.tables_demo import main

if __name__ == "__main__":
    sys.exit(main())
