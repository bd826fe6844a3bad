"""Machines that are lent with a GPU often have no video decoder. The checks here read no video, so that a module in its
place, which is good for being imported, is enough."""

import importlib.util
import sys
from types import ModuleType

# Imported by the data's modules when they are imported.
_DECODERS = ("av",)


class _Unusable(ModuleType):
    """Any name in it is an exception that nobody raises."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def stand_in_for_decoders() -> list[str]:
    """Puts stand-ins in the place of decoders that are not installed; returns their names."""
    missing = [name for name in _DECODERS if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = _Unusable(name)
    return missing
