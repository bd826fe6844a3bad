"""`python -m avion.engine.torchrun ...`: torchrun, but with the exit status of the processes it started.

torchrun makes status 1 of every failure, so that a batch script cannot tell a run that was asked to stop (75, see
`signals`) from one that failed. SIGUSR1 is for the processes: the agent lets it pass. On SIGTERM it does as torchrun
does: it hands it on, waits 30 seconds for the processes to write their checkpoint, and leaves with status 143.
"""

import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with these words (None: `sys.argv`); 0, or the status that the failed processes have in common."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        run.main(argv)
    except SignalException as e:
        return 128 + e.sigval
    except ChildFailedError as e:
        # Those that outlive the first one to fail are ended by the agent's SIGTERM.
        statuses = {failure.exitcode for failure in e.failures.values()} - {-signal.SIGTERM}
        if len(statuses) == 1 and min(statuses) > 0:
            return statuses.pop()
        raise
    finally:
        signal.signal(signal.SIGUSR1, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
