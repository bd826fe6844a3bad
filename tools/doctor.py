"""Say what this machine can run, what it cannot run, and what to do about it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
