"""Files of predictions, for analyses and for the servers of EPIC-KITCHENS-100. They are written whole or not at all."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avion.errors import UserError
from avion.files import written_whole

# numpy 2 pickles arrays under a module name that numpy 1 does not have. Both read arrays under the old name.
_NUMPY_2, _NUMPY_1 = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"


def portable_pickle(value: Any) -> bytes:
    """A pickle of plain containers, texts, numbers and numpy arrays that any numpy reads (protocol 3)."""
    # The name is there once, before the bytes of the first array; later arrays refer back to it.
    return pickle.dumps(value, protocol=3).replace(_NUMPY_2, _NUMPY_1, 1)


def zipped(name: str, content: bytes) -> bytes:
    """A zip file with one file in it; the same content gives the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo(name)  # a file of a fixed date
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 6)
    return buffer.getvalue()


def action_zip(submission: Mapping[str, Any]) -> bytes:
    """What `avion.evaluation.submission.action_submission` returns as the server takes it: test.json in a zip file."""
    return zipped("test.json", json.dumps(submission, separators=(",", ":"), allow_nan=False).encode())


def retrieval_zip(submission: Mapping[str, Any]) -> bytes:
    """What `retrieval_submission` returns as the server takes it: test.pkl in a zip file."""
    return zipped("test.pkl", portable_pickle(dict(submission)))


def check_target(path: str | os.PathLike, flag: str, suffix: str = "") -> None:
    """Raise UserError unless a file can be written as `path`, before hours go into what is to be written."""
    target = Path(path)
    if suffix and target.suffix != suffix:
        raise UserError(f"{flag} {path}: a {suffix} file is written; give a name that ends in {suffix}")
    if target.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {target.parent} cannot be made ({error.strerror}); choose another") from error
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{flag} {path}: {target.parent} cannot be written to; choose another folder")


def write_whole(path: str | os.PathLike, content: bytes, flag: str) -> None:
    """Write the content of a file that `flag` asked for."""
    with written_whole(path, flag=flag, cure="choose another") as file:
        file.write(content)
