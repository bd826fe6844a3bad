"""Runs whose `--output-dir` is an address: a working folder here, and a mirror of it there.

A run writes everything into its working folder, as into any other. A thread of process 0 brings what changed to the
remote folder, off the training's path. It uploads in such an order that a run which goes on from the remote folder
finds what a local folder could hold after a kill:

    files of features, events   before the lines that speak of them
    logs                        before the checkpoint that knows their lengths
    checkpoint_best.pt          before the checkpoint.pt that knows its metric
    checkpoint_previous*.pt     copies of checkpoint.pt within the store, before it is replaced
    checkpoint.pt               last, whole or not at all

`remote_lock` says who may write. Which of two folders is newer is never guessed from times: the remote file
`run_writer.json` names the working folder that wrote last. If it is ours, ours is the newer one, whatever became of the
uploads. If not, the remote folder is brought here.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from avion.errors import UserError
from avion.files import PARTIAL, write_text, written_whole
from avion.folder_lock import LOCK_FILE
from avion.reading import parse_json, read_text
from avion.remote import Remote, cache_root, is_remote, joined
from avion.weights import Checkpoint

from .args import Options
from .remote_lock import RemoteLock
from .resume import Start
from .run_files import BEST, EPOCHS, EVALUATIONS, LATEST, LOGS, PROGRESS
from .signals import Stopped

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Options)
Identity = tuple[int, int, int]  # inode, size and modification time: what tells whether a file is another one

WRITER, STATE = "run_writer.json", ".mirror"
POLL_S, LOGS_S, AGAIN_S = 1.0, 30.0, 30.0  # looking for new checkpoints; for new lines; after a failed upload
_SHARE = 0.1  # of the time may go into uploads of files that only grow
_TEXTS = (".txt", ".log", ".jsonl", ".json", ".csv")
_KINDS = (*_TEXTS, ".pt", ".npy", ".npz", ".pkl", ".zip", ".yaml")
_FOLDERS = ("tensorboard", "wandb", "features", "slurm")
_MOST_FILES = 10_000


# --- where ---------------------------------------------------------------------------------------


def working_folder(address: str) -> Path:
    """The folder of this machine in which the run of a remote folder works.

    Below AVION_WORK, else below `runs` in the folder of local copies (AVION_CACHE, ~/.cache/avion).
    """
    below = Path(os.environ.get("AVION_WORK") or cache_root() / "runs")
    address = address.rstrip("/")
    return below / hashlib.blake2b(address.encode(), digest_size=8).hexdigest() / address.rpartition("/")[2]


def in_working_folder(options: T) -> T:
    """The options with the working folder in the place of an address as `--output-dir`; others as they are.

    Also a `--resume` within the remote folder becomes one within the working folder. `Options.values` keeps the
    address.
    """
    address = getattr(options, "output_dir", "")
    if not is_remote(address):
        return options
    folder = working_folder(address)
    changed: dict[str, Any] = {"output_dir": str(folder), "address": address.rstrip("/")}
    resume = getattr(options, "resume", "")
    if resume.startswith(changed["address"] + "/"):
        changed["resume"] = str(folder / resume.removeprefix(changed["address"] + "/"))
    return dataclasses.replace(options, **changed)


def readable(start: Start, options: Options, world: Any) -> Start:
    """The start of process 0 for this process: on other machines, a checkpoint of the run is read from its address."""
    if not options.address:
        return start
    here = f"{socket.gethostname()} {_boot()}"
    folder = working_folder(options.address)
    elsewhere = world.broadcast(here) != here
    if not elsewhere or start.path is None or Path(start.path).parent != folder:
        return start
    return dataclasses.replace(start, path=joined(options.address, Path(start.path).name))


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


# --- the mirror ----------------------------------------------------------------------------------


@contextlib.contextmanager
def kept(address: str, folder: Path, meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep a remote folder like a working folder until the block is left. The caller holds the working folder.

    At the beginning the newer of the two becomes both. At the end, also after an error or a signal, all is uploaded.

    Args:
        address: The remote folder.
        folder: The working folder.
        meanwhile: Is called while another run's lock is watched; what it raises ends the wait.

    Raises:
        UserError: Another run writes there; the place cannot be asked or written to; or, at the end of a block without
            an error, not everything could be uploaded.
    """
    place = Remote(address)
    with RemoteLock(place, joined(address, LOCK_FILE), address, meanwhile) as lock:
        mirror = Mirror(place, address, folder, lock)
        try:
            mirror.begin()
        except OSError as e:
            raise UserError(f"--output-dir {address}: {e.strerror or e}") from e
        mirror.start()
        try:
            yield
        except BaseException as e:
            problem = mirror.end()
            if problem and lock.taken_by and isinstance(e, Stopped):  # it was stopped because of that
                raise UserError(problem) from e
            if problem:
                logger.error("%s", problem)
            raise
        if problem := mirror.end():
            raise UserError(problem)


class Mirror:
    """Brings the changes of a working folder to a remote folder."""

    def __init__(self, place: Remote, address: str, folder: Path, lock: RemoteLock):
        self.place, self.address, self.folder, self.lock = place, address, folder, lock
        self.uploaded: dict[str, Identity] = {}
        self._id = ""
        self._failing = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    # ---- the beginning -------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the newer of the two folders both. Raises OSError as `Remote` does."""
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        self._read_state()
        try:
            facts = parse_json(self.place.read(joined(self.address, WRITER)))
            writer = facts.get("id")
        except (FileNotFoundError, ValueError, AttributeError):
            facts, writer = {}, None
        if writer is None or writer != self._id:
            self._bring()
            if not list(self.folder.glob("*.pt")):
                drop_lines_of_a_lost_run(self.folder, facts.get("logs"))
            self._id = secrets.token_hex(8)
            facts = {"id": self._id, "logs": _lengths(self.folder)}
            self.place.write(joined(self.address, WRITER), json.dumps(facts).encode())
            self._write_state()
        elif due := self._due():
            logger.info("%s: %d files that an earlier run here could not upload follow now", self.address, len(due))
        self.upload()
        logger.info("%s: the run works in %s and uploads what it writes", self.address, self.folder)

    def _bring(self) -> None:
        """Make the working folder what the remote folder is."""
        self.place.forget()
        names = self._names_there()
        left = [path for path in self.folder.iterdir() if path.name not in (LOCK_FILE, STATE)]
        if left and self._id and self._due():
            aside = self.folder.with_name(f"{self.folder.name}.{self._id}")
            logger.warning(
                "%s was written by a run elsewhere since; files of this machine that were never uploaded are now in %s",
                self.address,
                aside,
            )
            aside.mkdir(exist_ok=True)
            for path in left:
                os.replace(path, aside / path.name)
        (self.folder / STATE / "state.json").unlink(missing_ok=True)  # until all is there, nothing here counts
        self.uploaded = {}
        for path in self.folder.iterdir():
            if path.name not in (LOCK_FILE, STATE):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in names:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}{PARTIAL}")
            self.place.get(joined(self.address, name), str(partial))
            os.replace(partial, target)
            self.uploaded[name] = _identity(target)
        drop_later_lines(self.folder)
        if names:
            logger.info("%s: %d files brought to %s", self.address, len(names), self.folder)

    def _names_there(self) -> list[str]:
        """The files of the remote folder that a run writes."""
        root = self.place.fs._strip_protocol(self.address).rstrip("/") + "/"
        found = self.place.asked(self.address, lambda: _found(self.place.fs, self.address))
        names = [path[len(root) :] for path in found if path.startswith(root)]
        ours = [name for name in names if _is_ours(name)]
        if len(ours) > _MOST_FILES:
            raise UserError(
                f"--output-dir {self.address}: {len(ours)} files are there, which no run wrote; choose another"
            )
        return sorted(ours)

    # ---- in the course of the run --------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        last, took, failed = time.monotonic(), 0.0, -AGAIN_S
        while not self._ending.wait(POLL_S):
            now = time.monotonic()
            if self.lock.taken_by or now - failed < AGAIN_S:
                continue
            try:
                due = self._due()
                if not any(name.endswith(".pt") for name in due) and now - last < max(LOGS_S, took / _SHARE):
                    continue
                if due:
                    self.upload()
                    last, took = time.monotonic(), time.monotonic() - now
                if self._failing:
                    self._failing = False
                    logger.info("%s: all is uploaded again", self.address)
            except Exception as e:  # of any client; the training is worth more than its mirror
                failed = time.monotonic()
                if not self._failing:
                    self._failing = True
                    logger.warning(
                        "%s: cannot be written (%s); the run goes on, keeps its files in %s, and tries again",
                        self.address,
                        getattr(e, "strerror", None) or e,
                        self.folder,
                    )

    def _due(self) -> list[str]:
        """The files that are not as they were when they were uploaded."""
        return [name for name, identity in self._files().items() if self.uploaded.get(name) != identity]

    def _files(self) -> dict[str, Identity]:
        found = {}
        for top, folders, names in os.walk(self.folder):
            folders[:] = [f for f in folders if not f.startswith(".") and not os.path.islink(os.path.join(top, f))]
            for name in names:
                path = Path(top, name)
                if name.startswith(".") or name.endswith(PARTIAL) or name == LOCK_FILE or path.is_symlink():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[path.relative_to(self.folder).as_posix()] = _identity(path)
        return found

    def upload(self) -> None:
        """Upload what has changed. Raises OSError as `Remote` does."""
        snapshot = self.folder / STATE / "snapshot"
        shutil.rmtree(snapshot, ignore_errors=True)
        try:
            for name, path, identity in self._snapshot(snapshot):
                self.lock.check()
                target = joined(self.address, name)
                same = [n for n, i in self.uploaded.items() if i == identity and n != name]
                if same and name.endswith(".pt"):
                    self.place.copy(joined(self.address, same[0]), target)
                else:
                    self.place.put(str(path), target)
                self.uploaded[name] = identity
                self._write_state()
            self._remove_what_is_gone()
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _snapshot(self, snapshot: Path) -> list[tuple[str, Path, Identity]]:
        """What is to be uploaded, in this order: (name, where its content stands still, identity).

        Checkpoints are held first, as hard links, and logs are copied after them: the logs then have at least the lines
        that the checkpoints know of.
        """
        before = self._files()
        checkpoints = [name for name in before if name.endswith(".pt") and "/" not in name]
        checkpoints.sort(key=lambda name: (name != LATEST, name == BEST, name))
        linked = [found for name in checkpoints if (found := self._still(name, snapshot, link=True)) is not None]
        texts, others = [], []
        for name in self._files():
            if name.endswith(_TEXTS):
                texts.append(self._still(name, snapshot, link=False))
        for name, identity in self._files().items():
            if not name.endswith(_TEXTS) and name not in checkpoints and not name.endswith(".pt"):
                others.append((name, self.folder / name, identity))
        latest = next((identity for name, _, identity in linked if name == LATEST), None)
        # Best, previous ones from the oldest, latest. A previous one that is the latest too comes with the next upload.
        linked = [found for found in reversed(linked) if found[0] == LATEST or found[2] != latest]
        linked.sort(key=lambda found: (found[0] == LATEST, found[0] != BEST))
        files = [*others, *(found for found in texts if found is not None), *linked]
        return [found for found in files if self.uploaded.get(found[0]) != found[2]]

    def _still(self, name: str, snapshot: Path, *, link: bool) -> tuple[str, Path, Identity] | None:
        """A file as it is now, under a name at which it does not change; None where it is gone."""
        path, target = self.folder / name, snapshot / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            identity = _identity(path)
            if link:
                try:
                    os.link(path, target)
                    return name, target, _identity(target)
                except OSError:  # a file system without hard links: a checkpoint is renamed, never written to
                    return name, path, identity
            shutil.copyfile(path, target)
        except FileNotFoundError:
            return None
        return name, target, identity

    def _remove_what_is_gone(self) -> None:
        """Delete checkpoints there that are no longer kept here."""
        here = self._files()
        for name in [name for name in self.uploaded if name.endswith(".pt") and name not in here]:
            self.lock.check()
            self.place.remove(joined(self.address, name))
            del self.uploaded[name]
            self._write_state()

    # ---- the end -------------------------------------------------------------------------------

    def end(self) -> str:
        """Upload the rest. Returns what is wrong, in one line; empty where all is there."""
        self._ending.set()
        self._thread.join()
        if self.lock.taken_by:
            return (
                f"--output-dir {self.address}: another run ({self.lock.taken_by}) has taken it over; this run ends, "
                f"and what it wrote since is in {self.folder}"
            )
        try:
            if due := self._due():
                logger.info("%s: uploading %d files before the end", self.address, len(due))
                self.upload()
                self.upload()  # what was linked to a file that came later
        except Exception as e:  # of any client
            left = len(self._due())
            return (
                f"--output-dir {self.address}: {left} files could not be uploaded "
                f"({getattr(e, 'strerror', None) or e}); they are in {self.folder}, and the same command on this "
                "machine uploads them and goes on"
            )
        return ""

    # ---- what is known -------------------------------------------------------------------------

    def _read_state(self) -> None:
        try:
            state = parse_json(read_text(self.folder / STATE / "state.json"))
            if state["address"] == self.address:
                self._id = str(state["id"])
                self.uploaded = {str(name): tuple(map(int, of)) for name, of in state["uploaded"].items()}  # type: ignore
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._id, self.uploaded = "", {}

    def _write_state(self) -> None:
        state = {"address": self.address, "id": self._id, "uploaded": self.uploaded}
        write_text(self.folder / STATE / "state.json", json.dumps(state), cure="point AVION_WORK at another place")


def drop_later_lines(folder: Path) -> None:
    """Cut off the lines of epochs that the checkpoint of a run has not come to.

    Where uploads are slow, the logs of a remote folder can be ahead of its checkpoint by more than an epoch when the
    run is killed. The run that goes on writes those lines again.
    """
    try:
        training = Checkpoint.open(folder / LATEST, verify=False).training
    except UserError:  # none, or a damaged one, of which the run itself tells
        return
    if training is None:
        return
    for name in (EPOCHS, EVALUATIONS):
        path, known = folder / name, training.logs.get(name)
        if not path.is_file() or not isinstance(known, list | tuple) or not known:
            continue
        content = path.read_bytes()
        kept = content[: int(known[0])]
        for line in content[int(known[0]) :].splitlines(keepends=True):
            try:
                later = parse_json(line, nan=True).get("epoch", -1) >= training.epoch
            except (ValueError, AttributeError, TypeError):
                later = False
            kept += b"" if later else line
        if kept != content:
            logger.info("%s: lines of epochs that %s has not come to are cut off", path, LATEST)
            with written_whole(path, cure="point AVION_WORK at another place") as file:
                file.write(kept)


def drop_lines_of_a_lost_run(folder: Path, before: object) -> None:
    """Cut off the lines of a training that was killed before its first checkpoint had come to the remote folder.

    Logs are uploaded before checkpoints, so they can be there alone. The next run begins anew, and writes those lines
    again. Lines of evaluations without training stay: a training also writes steps.txt.

    Args:
        folder: A folder without a checkpoint.
        before: By name of a log, the bytes that it had before the run that wrote last; anything else: none is known.
    """
    if not isinstance(before, dict) or not all(isinstance(before.get(n), int) and before[n] >= 0 for n in LOGS):
        return
    now = _lengths(folder)
    if now[PROGRESS] <= before[PROGRESS] and now[EPOCHS] <= before[EPOCHS]:
        return
    for name in LOGS:
        if now[name] > before[name]:
            logger.info("%s: the lines of a run that left no checkpoint are cut off", folder / name)
            os.truncate(folder / name, before[name])


def _lengths(folder: Path) -> dict[str, int]:
    """The bytes of the logs in a folder, by name; 0 for those that are not there."""
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in LOGS}


def _found(fs: Any, folder: str) -> list[str]:
    try:
        return list(fs.find(folder))
    except FileNotFoundError:
        return []


def _is_ours(name: str) -> bool:
    """Whether a file of a remote folder may be a run's."""
    if name in (LOCK_FILE, WRITER) or name.endswith(PARTIAL) or any(p.startswith(".") for p in name.split("/")):
        return False
    top, slash, _ = name.partition("/")
    return top in _FOLDERS if slash else name.endswith(_KINDS)


def _identity(path: Path) -> Identity:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns
