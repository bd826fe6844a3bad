"""Draw curves of one or several training runs as a picture."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.commands.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
