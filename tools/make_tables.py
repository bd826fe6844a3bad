"""Make the paper's tables and Fig. 5 from runs of recipes, with the measured metrics beside the paper's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.make_tables import main

if __name__ == "__main__":
    sys.exit(main())
