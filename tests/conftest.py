"""What every test runs under: one thread, no network, new seeds, Ctrl-C heeded; Triton's interpreter without a GPU."""

import logging
import os
import random
import signal
import zlib

# Before torch and numpy start their thread pools; children, such as torchrun's, inherit these.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


def pytest_configure(config):
    # Through the environment, so that the workers of pytest-xdist draw the same tests' seeds.
    os.environ.setdefault("TEST_SEED", str(random.SystemRandom().randrange(2**31)))
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # `make test &` in a script; programs would ignore Ctrl-C too
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files whose tests take up to a minute each begin first, so that at the end no process is alone with one of them.
LONGEST = (
    "tests/test_notebook.py",
    "tests/weights/test_exporting.py",
    "tests/ops/test_triton_compiles.py",
    "tests/test_gpu_report.py",
    "tests/engine/test_pretrain.py",
    "tests/engine/test_remote_inputs.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))  # the order within them and of the others stays


def pytest_report_header(config):
    return f"random inputs: TEST_SEED={os.environ['TEST_SEED']} (set it to repeat this run)"


@pytest.fixture(autouse=True)
def fresh_seed(request) -> int:
    """This test's seed, from TEST_SEED and the test's name; the global generators start from it."""
    seed = zlib.crc32(f"{os.environ['TEST_SEED']} {request.node.nodeid}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def rng(fresh_seed) -> np.random.Generator:
    return np.random.default_rng(fresh_seed)


@pytest.fixture(autouse=True)
def logging_as_before():
    """A test, or a fixture of several, that runs an entry point in this process leaves its log to no other test."""
    _forget_logs()
    yield
    _forget_logs()


def _forget_logs() -> None:
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "of_this_project", False)]:
        root.removeHandler(handler)
        handler.close()
        root.setLevel(logging.WARNING)
