"""Answer EgoSchema's questions about long videos, zero-shot, from any checkpoint of a video-language model."""

import sys

from avion.commands.egoschema import main

if __name__ == "__main__":
    sys.exit(main())
