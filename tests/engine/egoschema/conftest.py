"""Running main_egoschema.py on a few questions."""

import pytest

import main_egoschema
from tests.engine.egoschema.case import write_egoschema


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_egoschema(tmp_path_factory.mktemp("egoschema"))


@pytest.fixture
def runs(data, tmp_path, capsys):
    """Run the entry point: status, stdout, and the lines on stderr that are no log lines."""

    def run(*more, output=None, without=()):
        pairs = zip(data.flags[::2], data.flags[1::2], strict=True)
        words = [word for pair in pairs if pair[0] not in without for word in pair]
        status = main_egoschema.main([*words, "--output-dir", str(output or tmp_path / "out"), *map(str, more)])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if not line[:1].isdigit()]
        assert "Traceback" not in captured.err
        return status, captured.out, errors, captured.err

    return run


@pytest.fixture
def fails(runs):
    """The one line of a run that must fail."""

    def run(*more, **options):
        status, out, errors, log = runs(*more, **options)
        assert status == 2 and len(errors) == 1, log
        assert errors[0].startswith("main_egoschema.py: error: ")
        return errors[0]

    return run
