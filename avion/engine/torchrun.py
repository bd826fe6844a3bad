"""`python -m avion.engine.torchrun ...` is torchrun with the exit status of its processes, and without its own report.

torchrun itself turns every failure into status 1, so that a batch script cannot tell a run that was asked to stop (75,
see `avion.engine.signals`) from a run that failed. It also adds some 45 lines to what the processes printed; this
program prints one line of that, and only where no process could print anything. SIGUSR1 is meant for the processes, and
this program ignores it. On SIGTERM and SIGINT this program does what torchrun does: it passes the signal on, waits 30
seconds for the processes to write their checkpoint, and leaves with status 143 or 130.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from avion.errors import say

from .signals import STOPPED


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with these words.

    Args:
        argv: The words of the command line (None: `sys.argv[1:]`).

    Returns:
        0; or the status that the processes that failed by themselves have in common, or 1 where they differ; or 128 + n
        where signals ended all of them, n being the number of the first signal.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    reports = logging.getLogger("torch.distributed.elastic")
    reports.addFilter(_is_news)
    for name in ("multiprocessing.api", "agent.server.api", "multiprocessing.errors"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(_is_news)
    try:
        run.main(argv)
    except SignalException as e:
        return 128 + e.sigval
    except ChildFailedError as e:
        return _status(e)
    finally:
        signal.signal(signal.SIGUSR1, before)
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log line of torchrun says more than that processes ended, or that the others are ended now."""
    text = record.getMessage()
    return not any(
        word in text for word in ("closing signal", "failed (exitcode", "death signal", "with no error file")
    )


def _status(error: ChildFailedError) -> int:
    """The status after some processes failed. One line where none of them was left to say why."""
    own = {f.exitcode for f in error.failures.values() if f.exitcode > 0}
    ended = {f.exitcode for f in error.failures.values() if f.exitcode < 0}
    if not own and -signal.SIGTERM not in ended:
        _, first = error.get_first_failure()
        name = signal.Signals(-first.exitcode).name
        say(f"torchrun: error: process {first.local_rank} here (pid {first.pid}) was ended by {name}", to_stderr=True)
    if not own:
        return 128 - error.get_first_failure()[1].exitcode
    # The processes that are still there after the first failure are ended by a SIGTERM of torchrun.
    if len(own) > 1 or (own == {STOPPED} and ended - {-signal.SIGTERM}):
        return 1
    return own.pop()


if __name__ == "__main__":
    sys.exit(main())
