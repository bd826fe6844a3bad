"""`python -m avion.engine.torchrun ...`: torchrun with the exit status of the processes that it started.

torchrun itself turns every failure into status 1, so that a batch script cannot tell a run that was asked to stop (75,
see `signals`) from a run that failed. SIGUSR1 is meant for the processes, and this program ignores it. On SIGTERM this
program does what torchrun does: it hands the signal on, waits 30 seconds for the processes to write their checkpoint,
and leaves with status 143.
"""

import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with these words (None: `sys.argv`).

    Returns:
        0, or the status that the failed processes have in common.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        run.main(argv)
    except SignalException as e:
        return 128 + e.sigval
    except ChildFailedError as e:
        # The processes that are still there after the first failure are ended by a SIGTERM of torchrun.
        statuses = {failure.exitcode for failure in e.failures.values()} - {-signal.SIGTERM}
        if len(statuses) == 1 and min(statuses) > 0:
            return statuses.pop()
        raise
    finally:
        signal.signal(signal.SIGUSR1, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
