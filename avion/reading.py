"""Files and texts from outside are read here in bounded time and memory. A leaf.

`open_file` and `read_text` take the place of `open` and `Path.read_text`. They raise OSError as these do, but never
wait for a named pipe. A path may be a URL such as `s3://bucket/file`, which is read through a local copy. `parse_json`
and `parse_yaml` take the place of `json.loads` and `yaml.safe_load`. They raise ValueError for everything that is not
plain data of a sensible size.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

from avion.remote import fetch, is_remote, place_of

if TYPE_CHECKING:
    import numpy as np

MOST_NESTED = 100  # lists in lists; Python's own recursion ends at 1000
_DIGITS = 1000  # of an integer; Python itself takes 4300, and squared time for each
_YAML_CHARACTERS = 100_000  # a configuration has a few thousand; the reader takes 10 microseconds for each
_YAML_NESTED = 20


# --- files -----------------------------------------------------------------------------------


def open_file(path: str | os.PathLike[str], mode: str = "rb", **text: Any) -> IO[Any]:
    """Open a regular file for reading, as `open` does.

    Args:
        path: The file, here or in a remote place.
        mode: "rb" or "r".
        text: `encoding`, `newline` and `errors`, as `open` takes them.

    Raises:
        OSError: The file cannot be opened, or is a folder, a named pipe, a socket or a device. Opening a named pipe
            would wait until somebody writes into it.
        UserError: A package that a URL needs is missing, or the URL holds credentials.
    """
    path = fetch(os.fspath(path)) if is_remote(path) else path
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        check_regular(os.fstat(handle).st_mode)
        return open(handle, mode, **text)
    except BaseException:
        os.close(handle)
        raise


def file_size(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a regular file, here or in a remote place. Raises as `open_file` does."""
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


def file_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file or folder here, or such a file in a remote place.

    Raises:
        OSError: A remote place cannot be asked.
        UserError: As `open_file`.
    """
    if not is_remote(path):
        return os.path.exists(path)
    try:
        place_of(os.fspath(path)).facts(os.fspath(path))
    except FileNotFoundError:
        return False
    return True


def check_regular(mode: int) -> None:
    """Refuse a file that is not a regular file.

    Args:
        mode: The `st_mode` of the file.

    Raises:
        OSError: The file is something else; the text says what it is.
    """
    if stat.S_ISREG(mode):
        return
    kinds: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    kind = next((name for test, name in kinds if test(mode)), "something else")
    raise OSError(errno.EINVAL, f"it is {kind}, a regular file is required")


def read_text(path: str | os.PathLike[str], *, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Read the whole text of a regular file.

    Args:
        path: The file.
        encoding: As `open` takes it.
        errors: As `open` takes it.

    Returns:
        The text.

    Raises:
        OSError: The file cannot be opened or is not a regular file.
        UnicodeDecodeError: The file does not hold text in this encoding.
    """
    with open_file(path, "r", encoding=encoding, errors=errors) as file:
        return file.read()


# --- texts -----------------------------------------------------------------------------------


def parse_json(
    text: str | bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, nan: bool = False
) -> Any:
    """Parse a JSON text.

    Args:
        text: The text.
        pairs: The function that makes a value of the pairs of an object, as `json.loads` takes it; None makes a dict.
        nan: Whether NaN and infinities are read, which Python writes but JSON does not have.

    Returns:
        The value that the text says.

    Raises:
        ValueError: The text is not JSON (json.JSONDecodeError), holds NaN or an infinity though `nan` is False, an
            integer of more than 1000 digits, or lists in lists more than 100 deep.
    """
    try:
        constant = None if nan else _no_constant
        value = json.loads(text, parse_int=_integer, parse_constant=constant, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"lists or objects are nested more than {MOST_NESTED} deep") from None
    check_nesting(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def parse_yaml(text: str) -> Any:
    """Parse a YAML text of mappings, lists, numbers, texts and dates.

    Args:
        text: The text.

    Returns:
        The value that the text says.

    Raises:
        ValueError: The text is not YAML or is too long, has an alias (`*name`, by which a short text says a huge one),
            an integer of more than 1000 digits or mappings in mappings more than 20 deep. The message names the line.
    """
    import yaml

    if len(text) > _YAML_CHARACTERS:
        raise ValueError(f"{len(text)} characters of YAML, at most {_YAML_CHARACTERS} are read")
    loader = None
    try:
        loader = _yaml_loader()(text)
        return loader.get_single_data()
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        problem = getattr(e, "problem", None) or "it holds a character that YAML does not allow"
        raise ValueError(f"not valid YAML{where}: {problem}") from e
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as e:
        # A tag or the form of a scalar promises a value that the scalar does not say: 2001-13-45, !!int x.
        line = f" before line {loader.line + 1}" if loader is not None else ""
        raise ValueError(f"not valid YAML{line}: {' '.join(str(e).split())[:80] or type(e).__name__}") from e


def _yaml_loader() -> type:
    """Make PyYAML's safe loader with bounds. It is made here so that nobody imports PyYAML before it is used."""
    import yaml

    class Bounded(yaml.SafeLoader):
        nested = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                problem = f"the alias *{event.anchor}, which is not read here; write its value out"
                raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
            self.nested += 1
            if self.nested > _YAML_NESTED:
                problem = f"more than {_YAML_NESTED} mappings or lists in one another"
                raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
            node = super().compose_node(parent, index)
            self.nested -= 1
            return node

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > _DIGITS:
                problem = f"an integer of {len(node.value)} characters"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_yaml_int(node)

    Bounded.add_constructor("tag:yaml.org,2002:int", Bounded.construct_yaml_int)
    return Bounded


# --- arrays ----------------------------------------------------------------------------------


def check_npy(file: IO[bytes], size: int) -> None:
    """Refuse a .npy file that does not hold plain numbers, or not as many as its header says.

    Args:
        file: The file, at its beginning.
        size: The size of the file in bytes.

    Raises:
        ValueError: The file holds something else; the text says what.
    """
    import numpy as np

    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.hasobject or not dtype.itemsize or any(n < 0 for n in shape):
        raise ValueError(f"dtype {dtype}, numbers are required")
    there, stated = size - file.tell(), math.prod(shape) * dtype.itemsize
    if there != stated:
        raise ValueError(f"{there} bytes of numbers, the header says {stated}")


def read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """Read the array of a .npy file.

    Args:
        file: The file, at its beginning.
        size: The size of the file in bytes.

    Returns:
        The array.

    Raises:
        ValueError: As `check_npy` raises it, before the array is made.
    """
    import numpy as np

    check_npy(file, size)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


# --- nesting ---------------------------------------------------------------------------------


def check_nesting(
    value: Any, most: int = MOST_NESTED, inside: Mapping[type, Callable[[Any], Iterable[Any]]] | None = None
) -> None:
    """Refuse values in which lists, dicts, tuples and sets are nested too deep.

    Such a value breaks whatever goes through it by recursion, even the text of an error message. A part that is shared
    is gone through once per level; a container that holds itself is endlessly deep.

    Args:
        value: The value that was read.
        most: The largest depth that is allowed.
        inside: By type, a function that gives the values inside of an object of another kind.

    Raises:
        ValueError: The value is nested deeper than `most`.
    """
    parts: dict[type, Callable[[Any], Iterable[Any]]] = {
        list: iter,
        tuple: iter,
        set: iter,
        frozenset: iter,
        dict: _keys_and_values,
        OrderedDict: _keys_and_values,
        **(inside or {}),
    }
    level: list[Any] = [value] if type(value) in parts else []
    for _ in range(most):
        items = chain.from_iterable(parts[type(item)](item) for item in level)
        level = list({id(item): item for item in items if type(item) in parts}.values())
        if not level:
            return
    raise ValueError(f"lists or objects are nested more than {most} deep")


def _keys_and_values(mapping: Mapping[Any, Any]) -> Iterable[Any]:
    return chain(mapping.keys(), mapping.values())
