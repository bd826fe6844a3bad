"""Models, mixers and towers that a test registers, gone when the test is over."""

import contextlib

from avion.models import built_in, config, registry, tower  # noqa: F401  (the built-in models are there before)

_TABLES = (registry.MODELS, registry.ALIASES, config.MIXERS, tower.TOWERS)


@contextlib.contextmanager
def registered_for_a_while():
    """What is registered in this block is taken away again at its end."""
    import avion.models.built_in  # noqa: F401  (the project's own models are registered first, and stay)

    before = [dict(table) for table in _TABLES]
    try:
        yield
    finally:
        for table, content in zip(_TABLES, before, strict=True):
            table.clear()
            table.update(content)
