"""`python -m avion COMMAND ...` is the command `avion`; torchrun starts several processes of it with `-m avion`."""

import sys

from avion.commands.console import main

if __name__ == "__main__":
    sys.exit(main())
