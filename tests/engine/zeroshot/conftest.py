"""Running main_zeroshot.py on the small benchmarks."""

import pytest

import main_zeroshot
from tests.engine.zeroshot.case import write_benchmarks


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("zeroshot"))


@pytest.fixture
def runs(data, tmp_path, capsys):
    """Run the entry point on some benchmarks: status, stdout, and stderr."""

    def run(*more, datasets=("egtea",), output=None):
        words = [*data.flags, "--dataset", *datasets, "--output-dir", output or tmp_path / "out", *more]
        status = main_zeroshot.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run
