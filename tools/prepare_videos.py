"""Turn raw videos into videos that training reads quickly."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.prepare_videos import main

if __name__ == "__main__":
    sys.exit(main())
