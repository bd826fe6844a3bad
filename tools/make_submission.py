"""Make the files that the EPIC-KITCHENS-100 challenge servers take, from predictions; nothing is sent."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.make_submission import main

if __name__ == "__main__":
    sys.exit(main())
