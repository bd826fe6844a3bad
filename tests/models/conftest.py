import pytest

from tests.models.registered import registered_for_a_while


@pytest.fixture
def clean_registry():
    """Models that a test registers are gone after it."""
    with registered_for_a_while():
        yield
