import pytest

from avion.models import registry


@pytest.fixture
def clean_registry(monkeypatch):
    """Models that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
