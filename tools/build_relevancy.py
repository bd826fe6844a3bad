"""Build the relevancy pickle of a retrieval split from its CSVs, or compare an existing one with the CSVs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.build_relevancy import main

if __name__ == "__main__":
    sys.exit(main())
