"""Extract features of videos and sentences with any checkpoint, of clips or of windows over whole videos."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.extract_features import main

if __name__ == "__main__":
    sys.exit(main())
