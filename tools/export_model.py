"""Write one tower of a checkpoint as a program that runs without this project: torch.export or ONNX."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.export_model import main

if __name__ == "__main__":
    sys.exit(main())
