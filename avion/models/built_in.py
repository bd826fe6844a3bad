"""The towers of this project: importing this file registers them and their models. A new tower is imported here.

The registry imports this file when it is first asked for a model, so that importing `avion.models` takes no time.
"""

from . import joint, lavila, timemamba

__all__ = ["joint", "lavila", "timemamba"]
