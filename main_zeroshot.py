"""Evaluate any checkpoint of a video-language model on benchmarks that it was not trained for."""

import sys

from avion.commands.zeroshot import main

if __name__ == "__main__":
    sys.exit(main())
