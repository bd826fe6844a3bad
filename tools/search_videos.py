"""Search videos by a sentence, an image or a clip: make an index, ask it, or serve a page."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.search_videos import main

if __name__ == "__main__":
    sys.exit(main())
