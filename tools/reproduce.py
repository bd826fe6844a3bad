"""Show, run or submit to SLURM the command behind a row of the paper's tables, or evaluate the released weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
