"""Index the packets of a dataset's videos, so that training reads only the packets that a clip needs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.index_videos import main

if __name__ == "__main__":
    sys.exit(main())
