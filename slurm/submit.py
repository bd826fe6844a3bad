"""Submit an entry point to SLURM through submitit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.submit import main

if __name__ == "__main__":
    sys.exit(main())
