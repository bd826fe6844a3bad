"""Extract features of any list of videos with any checkpoint, into .npz or safetensors shards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.extract_features import main

if __name__ == "__main__":
    sys.exit(main())
