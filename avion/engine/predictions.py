"""Files of predictions, for people's own analyses and for EPIC-KITCHENS-100's servers: written whole or not at all."""

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

# numpy 2 pickles arrays under a module name that numpy 1 does not have; under the old one both read them.
_NUMPY_2, _NUMPY_1 = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"


def portable_pickle(value: Any) -> bytes:
    """A pickle of plain containers, texts, numbers and numpy arrays that any numpy reads (protocol 3)."""
    # The name stands once, before the first array's bytes; later arrays refer back to it.
    return pickle.dumps(value, protocol=3).replace(_NUMPY_2, _NUMPY_1, 1)


def zipped(name: str, content: bytes) -> bytes:
    """A zip of one file; the same content gives the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo(name)  # of a fixed date
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 6)
    return buffer.getvalue()


def action_zip(submission: Mapping[str, Any]) -> bytes:
    """`avion.evaluation.submission.action_submission`'s content as the server takes it: a zip of test.json."""
    return zipped("test.json", json.dumps(submission, separators=(",", ":"), allow_nan=False).encode())


def retrieval_zip(submission: Mapping[str, Any]) -> bytes:
    """`retrieval_submission`'s content as the server takes it: a zip of test.pkl."""
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
    """The content of a file that was asked for by `flag`."""
    with written_whole(path, flag=flag, cure="choose another") as file:
        file.write(content)
