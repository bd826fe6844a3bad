"""Objects of other libraries in the `args` of a checkpoint, read without their libraries and without their code.

Upstream saves its command line beside the weights, and its action recognition puts a `pandas.DataFrame` into it.
`torch.load(weights_only=True)` knows no such class and refuses the file. Here every name that it does not know becomes
an inert class (`Foreign`), whose objects only remember what the pickle gave to them. `scout` finds these names
before the weights are read; `refuse_outside_args` makes sure that no such object stands anywhere but in `args`.
"""

import argparse
import io
import os
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from avion.errors import UserError
from avion.reading import check_nesting
from avion.safe_pickle import Budget, Refused, Unpickler, check_keys, checkpoint_opcodes

# Data classes of Python itself that settings can hold; whatever else its modules have is a function that acts.
_PYTHON_DATA = frozenset({
    "_codecs.encode", "argparse.Namespace", "builtins.bool", "builtins.bytearray", "builtins.bytes",
    "builtins.complex", "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.getattr", "builtins.int",
    "builtins.list", "builtins.object", "builtins.range", "builtins.set", "builtins.slice", "builtins.str",
    "builtins.tuple", "collections.Counter", "collections.OrderedDict", "collections.defaultdict", "collections.deque",
    "copyreg._reconstructor", "datetime.date", "datetime.datetime", "datetime.timedelta", "datetime.timezone",
    "decimal.Decimal", "fractions.Fraction", "functools.partial", "pathlib.Path", "pathlib.PosixPath",
    "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "types.SimpleNamespace", "uuid.UUID",
})  # fmt: skip
_MOST_NAMES = 1000  # a real file has some twenty
_LARGEST_EXPANDED = 1 << 24  # elements of a tensor outside of the weights that is stretched over less data
_BEFORE_LEGACY_CONTENTS = 3  # pickles: magic number, version, system


# --- stand-ins -------------------------------------------------------------------------------


class Foreign:
    """Stands for an object of a class that is not loaded. What the pickle says is kept as it is, and is never used.

    Attributes:
        path: The dotted name of the class or function.
        args: The arguments that the class or function would be called with.
        state: The state that the object would be given afterwards; None where there is none.
    """

    path: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.path}, not loaded>"


class Scout:
    """Remembers which names the pickle of a `torch.save` file holds, and which objects it fills as dicts or as lists.

    Attributes:
        made: The plain containers that stand in for foreign ones, with the names of these, once the file was read.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.containers: dict[str, type] = {}
        self.made: list[tuple[Any, str]] = []

    def stand_ins(self, known: Iterable[str]) -> list[tuple[Any, str]]:
        """Make the classes that stand for foreign names.

        Args:
            known: The dotted names that PyTorch's reader knows.

        Returns:
            A class and the dotted name that it stands for, for each name that is not in `known` and may be data.
        """
        return [(self._stand_in(name), name) for name in sorted(self.names - set(known)) if _may_be_data(name)]

    def _stand_in(self, path: str) -> type:
        """Make the class that stands for `path`; for a foreign dict or list, a class that makes plain containers."""
        container = self.containers.get(path)
        if container is None:
            return type(path, (Foreign,), {"path": path})

        def make(cls: type, *args: Any) -> Any:
            # PyTorch's reader fills plain containers only. An OrderedDict also takes the attributes of a foreign dict.
            self.made.append((container(), path))
            return self.made[-1][0]

        return type(path, (Foreign,), {"path": path, "__new__": make})


def _may_be_data(path: str) -> bool:
    return path in _PYTHON_DATA or path.split(".")[0] not in sys.stdlib_module_names


class _Recorder:
    """Takes the place of every object while a pickle is scouted, and of everything that functions return.

    Functions that PyTorch calls itself, and that make more memory than they are given, are limited in what they may
    make.
    """

    path: ClassVar[str] = ""
    containers: ClassVar[dict[str, type]] = {}
    budget: ClassVar[Budget]

    def __new__(cls, *args: Any, **_: Any) -> "_Recorder":
        if cls.path in ("builtins.set", "builtins.frozenset", "collections.OrderedDict", "collections.Counter"):
            for items in args:
                items = list(items) if isinstance(items, (list, tuple, dict, set, frozenset)) else [0]
                pairs = cls.path == "collections.OrderedDict"
                check_keys(item[0] if pairs and isinstance(item, (list, tuple)) and item else item for item in items)
                cls.budget.charge(16 * len(items))
        elif cls.path == "_codecs.encode" or cls.path.startswith("builtins.byte"):
            if args and not isinstance(args[0], (str, bytes, bytearray, list, _Recorder)):
                raise Refused(f"a call of {cls.path} that makes memory")
            cls.budget.charge(len(args[0]) if args and not isinstance(args[0], _Recorder) else 0)
        elif cls.path.startswith("torch.") and cls.path.endswith(("Tensor", "Storage")) and args:
            raise Refused(f"a call of {cls.path} that makes memory")
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None:
        self.containers[self.path] = OrderedDict

    def append(self, item: Any) -> None:
        self.containers[self.path] = list

    def extend(self, items: Any) -> None:
        self.containers[self.path] = list


class _ScoutingUnpickler(Unpickler):
    """Looks no name up: each name gives a recorder, and each tensor gives None."""

    def __init__(self, file: IO[bytes], size: int, found: Scout, all_bytes: int) -> None:
        super().__init__(file, size, checkpoint_opcodes(all_bytes))
        self.found = found

    def find_class(self, module: str, name: str) -> Any:
        # Python 3 writes the names of Python 2 for its own modules (`__builtin__`, `copy_reg`) in this protocol.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        self.found.names.add(path)
        if len(self.found.names) > _MOST_NAMES:
            raise Refused(f"more than {_MOST_NAMES} different names of code")
        fields = {"path": path, "containers": self.found.containers, "budget": self.budget}
        return type("_Recorder", (_Recorder,), fields)

    def check_keys(self, keys: Iterable[Any]) -> None:
        # A foreign object, and a name itself, is hashed by its identity.
        super().check_keys(key for key in keys if not _hashed_by_identity(key))

    def persistent_load(self, pid: Any) -> None:
        return None


def _hashed_by_identity(key: Any) -> bool:
    kind = key if isinstance(key, type) else type(key)
    return issubclass(kind, _Recorder) and not (kind is not key and kind.path.startswith(("torch.", "builtins.")))


def scout_archive(archive: zipfile.ZipFile) -> Scout:
    """Go through the pickle of a zip archive that `torch.save` wrote, without calling anything.

    Args:
        archive: The open archive.

    Returns:
        The names and containers that were found.

    Raises:
        Exception: Any exception, since hostile bytes can make the reader raise anything.
    """
    found = Scout()
    all_bytes = sum(entry.file_size for entry in archive.infolist())
    for entry in archive.infolist():
        if entry.filename.split("/")[1:] == ["data.pkl"]:
            if entry.CRC == 0:  # written without checksums, see `integrity`
                entry.CRC = None
            file = io.BytesIO(archive.read(entry))
            _check_nesting(_ScoutingUnpickler(file, entry.file_size, found, all_bytes).load())
    return found


def scout(file: IO[bytes]) -> Scout:
    """Do what `scout_archive` does for a file of the format from before PyTorch 1.6, which is a sequence of pickles.

    Args:
        file: The open file.

    Returns:
        The names and containers that were found.

    Raises:
        Exception: Any exception, since hostile bytes can make the reader raise anything.
    """
    found = Scout()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for _ in range(_BEFORE_LEGACY_CONTENTS):
        _ScoutingUnpickler(file, size, Scout(), size).load()
    _check_nesting(_ScoutingUnpickler(file, size, found, size).load())
    return found


def _check_nesting(contents: Any) -> None:
    """Raise Refused where the contents of a checkpoint are nested too deep."""
    try:
        check_nesting(contents, inside={argparse.Namespace: lambda args: vars(args).values()})
    except ValueError as error:
        raise Refused(str(error)) from None


def check_sizes(contents: Any) -> None:
    """Refuse contents that are nested too deep, or that have a tensor far beyond its data.

    A stride of 0 lets a few bytes claim any shape, and a program that copies such a tensor would need the memory.

    Args:
        contents: The contents of a checkpoint, as they were read.

    Raises:
        Refused: There is such a tensor or such nesting; the text says what was found.
    """
    _check_nesting(contents)
    seen: set[int] = set()
    todo = [contents]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor) and item.layout == torch.strided and not item.is_meta:
            if item.numel() > max(_LARGEST_EXPANDED, item.untyped_storage().nbytes() // item.element_size()):
                raise Refused(f"a tensor of {item.numel()} elements without the data for them")
        elif isinstance(item, (dict, list, tuple, argparse.Namespace)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, argparse.Namespace):
                item = vars(item)
            todo += item.values() if isinstance(item, dict) else item


def refuse_outside_args(contents: Any, found: Scout, path: Path) -> None:
    """Refuse a file in which anything but the field `args` holds a stand-in.

    Args:
        contents: The contents of the file, as they were read.
        found: What `scout` found in this file.
        path: The path of the file, for messages.

    Raises:
        UserError: A stand-in stands elsewhere. The message names the field and the foreign name.
    """
    made = {id(container): name for container, name in found.made}
    plain = isinstance(contents, dict) and id(contents) not in made
    fields = contents.items() if plain else [("it", contents)]
    seen: set[int] = set()
    for field, value in fields:
        todo = [field] if field == "args" else [field, value]
        while todo:
            item = todo.pop()
            # A class itself can stand where an object of the class is expected.
            stood_in = isinstance(item, Foreign) or (isinstance(item, type) and issubclass(item, Foreign))
            if stood_in or id(item) in made:
                name = item.path if stood_in else made[id(item)]
                where = field if isinstance(field, str) and field.isprintable() else "a field"
                raise UserError(
                    f"{path}: refused, {where} asks for {name}, which is code and not weights (only args may hold "
                    "foreign objects): get the checkpoint from its authors, or have them save the state_dict alone"
                )
            if id(item) in seen or isinstance(item, (str, bytes, int, float)):
                continue
            seen.add(id(item))
            if isinstance(item, dict):
                todo += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset)):
                todo += item
            attributes = getattr(item, "__dict__", None)
            if isinstance(attributes, dict) and (attributes or not isinstance(item, Tensor)):
                todo.append(attributes)


# --- pandas ----------------------------------------------------------------------------------


def table_columns(table: Any) -> dict[str, list[Any]] | None:
    """Return the columns of a foreign `pandas.DataFrame`.

    Args:
        table: Anything that `args` holds.

    Returns:
        The numbers and texts of each column by the name of the column. None where the object is no such table, or where
        its parts are not of the form in which pandas 1.3 to 3 writes plain columns with numbered rows.
    """
    if not isinstance(table, Foreign) or not (table.path.startswith("pandas.") and table.path.endswith(".DataFrame")):
        return None
    try:
        blocks, (columns, rows) = table.state["_mgr"].args
        names = _index(columns)
        count = _numbered_rows(rows)
        found: dict[int, list[Any]] = {}
        for block in blocks:
            values, placement = _array(block.args[0]), block.args[1]
            places = _places(placement, len(names))
            if values.ndim != 2 or values.shape != (len(places), count):
                return None
            found |= dict(zip(places, values.tolist(), strict=True))
        return {names[place]: column for place, column in sorted(found.items())}
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        return None  # another form: nothing in it is believed


def _named(value: Any, *names: str) -> Foreign:
    if not isinstance(value, Foreign) or value.path.rpartition(".")[2] not in names:
        raise TypeError(f"{type(value).__name__} where {' or '.join(names)} is expected")
    return value


def _array(value: Any) -> np.ndarray:
    """Return the numpy array of numbers or of Python objects that a pickled state describes."""
    _, shape, dtype, fortran, raw = _named(value, "_reconstruct").state
    order = "F" if fortran is True else "C"
    if isinstance(raw, list):
        if shape != (len(raw),):
            raise ValueError("an array of objects in several dimensions")
        return np.fromiter(raw, object, len(raw))
    if dtype.code is None or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("no array of plain numbers")
    return np.frombuffer(raw, np.dtype(dtype.byteorder + dtype.code)).reshape(shape, order=order)


def _index(value: Any) -> list[str]:
    """Return the labels of a pandas Index of texts: an array of objects, or a string array of pandas 3."""
    data = _named(value, "_new_Index").args[1]["data"]
    state = data.state
    if isinstance(state, dict) and "_pa_array" in state:
        names = _arrow_texts(state["_pa_array"])
    else:
        names = _array(data if isinstance(state, tuple) and len(state) == 5 else _wrapped_array(data)).tolist()
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError("labels that are no different texts")
    return names


def _wrapped_array(data: Any) -> Any:
    """Return the numpy array inside a string array of pandas 3 without pyarrow."""
    parts = data.state if isinstance(data.state, tuple) else (data.state,)
    for part in parts:
        part = part.get("_ndarray") if isinstance(part, dict) else part
        if isinstance(part, Foreign) and part.path.endswith("._reconstruct"):
            return part
    raise ValueError("no array of texts")


def _arrow_texts(value: Any) -> list[str]:
    """Return the texts of one pyarrow array without missing values, which holds offsets and bytes in two buffers."""
    kind, length, missing, start, (valid, offsets, data), *_ = _named(value, "_restore_array").args[0]
    width = {"large_string": "<i8", "string": "<i4"}[_named(kind, "type_for_alias").args[0]]
    if valid is not None or missing not in (0, -1) or not 0 <= start <= start + length < 10**6:
        raise ValueError("an array with missing values")
    offsets, data = (bytes(_named(buffer, "py_buffer").args[0]) for buffer in (offsets, data))
    ends = np.frombuffer(offsets, width)[start : start + length + 1].tolist()
    if len(ends) != length + 1:
        raise ValueError("fewer texts than stated")
    return [data[a:b].decode() for a, b in zip(ends, ends[1:], strict=False)]


def _numbered_rows(value: Any) -> int:
    """Return the number of rows, where the rows are numbered from 0."""
    said = _named(value, "_new_Index").args[1]
    if (said["start"], said["step"]) != (0, 1) or type(said["stop"]) is not int:
        raise ValueError("rows in another order")
    return said["stop"]


def _places(placement: Any, count: int) -> list[int]:
    """Return the positions of the columns that a block holds, out of `count` columns."""
    if isinstance(placement, Foreign) and placement.path == "builtins.slice":
        places = range(count)[slice(*placement.args)]
    else:
        places = _array(placement).tolist()
    return [range(count)[place] for place in places]
