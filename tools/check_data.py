"""Check that the videos of some annotations exist, are long enough and can be decoded."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())
