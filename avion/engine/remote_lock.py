"""One run per remote folder, as far as an object store allows: a lock that its holder keeps alive.

The lock is a file in the remote folder that its holder writes again every few seconds. A holder that was killed writes
no more: after AVION_LOCK_S [60] seconds without a change another run takes the folder over, at once where the holder
was a process of the same machine that is gone. Object stores know no locks of their own, so this is what it promises:

    Two runs that live notice each other when the second one begins, also if both begin together.
    A holder that finds the lock to be another's uploads nothing more, and its run ends. It looks before every upload
    and every few seconds.
    Not promised: a machine that stood still for longer than AVION_LOCK_S, and wakes up in the middle of an upload,
    finishes that one.
"""

import dataclasses
import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

from avion.errors import UserError
from avion.folder_lock import Holder
from avion.remote import Remote

logger = logging.getLogger(__name__)

ABANDONED_S, SETTLE_S = 60.0, 1.0
_POLL_S = 0.25


class TakenOver(OSError):
    """The lock is another run's by now."""


class RemoteLock:
    """A context that holds the lock of a remote folder.

    Attributes:
        taken_by: Who holds the lock by now, where that is another run; else empty.

    Args:
        place: The place of the folder.
        path: The address of the lock.
        folder: The address of the folder, for messages.
        meanwhile: Is called while another's lock is watched; what it raises ends the wait.
    """

    def __init__(self, place: Remote, path: str, folder: str, meanwhile: Callable[[], None] = lambda: None):
        self.place, self.path, self.folder, self.meanwhile = place, path, folder, meanwhile
        self.taken_by = ""
        self._token, self._beats = secrets.token_hex(8), 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="remote lock", daemon=True)

    def __enter__(self) -> "RemoteLock":
        try:
            self._wait_until_free()
            self._write()
            time.sleep(SETTLE_S)  # another run that found it free may write now
            found = self._read()
        except OSError as e:
            raise UserError(f"--output-dir {self.folder}: {e.strerror or e}") from e
        if not self._is_own(found):
            raise UserError(self._refusal(found))
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()
        try:
            if self._is_own(self._read()):
                self.place.remove(self.path)
        except OSError as e:
            logger.warning(
                "%s stays behind (%s); the next run waits %.0f s for it", self.path, e.strerror, abandoned_s()
            )

    def check(self) -> None:
        """Raise TakenOver if the lock is another run's by now, and OSError where that cannot be seen."""
        if not self.taken_by:
            found = self._read()
            if found and not self._is_own(found):
                self._lose(found)
        if self.taken_by:
            raise TakenOver(f"another run ({self.taken_by}) has taken it over")

    def _wait_until_free(self) -> None:
        """Wait for the end of another's lock, or for its holder to be gone. UserError where the holder lives."""
        found, patience = self._read(), abandoned_s()
        holder = Holder.read(found) if found else None
        this = Holder.this_process()
        if found is None or (holder is not None and holder.host == this.host and not holder.is_alive()):
            return
        logger.info("%s: held by %s; waiting %.0f s for a sign of life", self.folder, holder or "another run", patience)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self.meanwhile()
            time.sleep(min(_POLL_S * max(patience / 15, 1), 2.0))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise UserError(self._refusal(now))
        logger.warning("%s: %s gave no sign of life and is taken for dead", self.folder, holder or "another run")

    def _refusal(self, found: bytes | None) -> str:
        holder = Holder.read(found) if found else None
        name = "another run" if holder is None else f"another run ({holder})"
        return f"--output-dir {self.folder}: {name} writes there; wait for it or stop it, or give another --output-dir"

    def _keep(self) -> None:
        """Write the lock again and again, until the end or until it is another's."""
        while not self._ending.wait(abandoned_s() / 6):
            try:
                self.check()
                self._write()
            except TakenOver:
                return
            except OSError as e:  # the mirror tells that the place cannot be written to
                logger.debug("%s: %s", self.path, e)

    def _lose(self, found: bytes) -> None:
        self.taken_by = str(Holder.read(found) or "of another machine")
        logger.error("%s: another run (%s) has taken it over; this run ends", self.folder, self.taken_by)
        os.kill(os.getpid(), signal.SIGTERM)  # the run ends as it does when it is asked to

    def _write(self) -> None:
        self._beats += 1
        line = {**dataclasses.asdict(Holder.this_process()), "token": self._token, "beat": self._beats}
        self.place.write(self.path, json.dumps(line).encode())

    def _read(self) -> bytes | None:
        self.place.forget()
        try:
            return self.place.read(self.path)[:4096]
        except FileNotFoundError:
            return None

    def _is_own(self, found: bytes | None) -> bool:
        return found is not None and self._token.encode() in found


def abandoned_s() -> float:
    """Seconds without a change after which a lock is taken for abandoned: AVION_LOCK_S, else 60.

    Raises:
        UserError: The variable holds no number of at least 1.
    """
    text = os.environ.get("AVION_LOCK_S", "")
    try:
        value = float(text) if text else ABANDONED_S
    except ValueError:
        value = 0.0
    if not 1 <= value <= 86400:
        raise UserError(f"AVION_LOCK_S {text}: a number of seconds from 1 to 86400 is required")
    return value
