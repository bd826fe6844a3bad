"""Writes files of predictions, for analyses and for the servers of EPIC-KITCHENS-100, whole or not at all."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from avion.errors import UserError
from avion.files import written_whole
from avion.targets import check_target, remember_target

if TYPE_CHECKING:
    from .options.shared import TrainingOptions

# numpy 2 pickles arrays under a module name that numpy 1 does not have. Both read arrays under the old name.
_NUMPY_2, _NUMPY_1 = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"


def portable_pickle(value: Any) -> bytes:
    """Make a pickle (protocol 3) that any version of numpy reads.

    Args:
        value: Plain containers, texts, numbers and numpy arrays.

    Returns:
        The bytes.
    """
    # The name occurs once, before the bytes of the first array; later arrays refer back to it.
    return pickle.dumps(value, protocol=3).replace(_NUMPY_2, _NUMPY_1, 1)


def zipped(name: str, content: bytes) -> bytes:
    """Make a zip file with one file in it. The same content gives the same bytes.

    Args:
        name: The name of the file in the zip.
        content: The content of the file.

    Returns:
        The bytes of the zip file.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo(name)  # a file of a fixed date
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 6)
    return buffer.getvalue()


def action_zip(submission: Mapping[str, Any]) -> bytes:
    """Make the zip file that the action recognition server takes: test.json with a submission.

    Args:
        submission: What `avion.evaluation.submission.action_submission` returns.

    Returns:
        The bytes of the zip file.
    """
    return zipped("test.json", json.dumps(submission, separators=(",", ":"), allow_nan=False).encode())


def retrieval_zip(submission: Mapping[str, Any]) -> bytes:
    """Make the zip file that the retrieval server takes: test.pkl with a submission.

    Args:
        submission: What `avion.evaluation.submission.retrieval_submission` returns.

    Returns:
        The bytes of the zip file.
    """
    return zipped("test.pkl", portable_pickle(dict(submission)))


def check_run_target(options: "TrainingOptions", path: str | None, flag: str, suffix: str = "") -> None:
    """Check the file that a flag of a run names to be written, before hours go into its content.

    A file that another flag names is never replaced. A training that goes on may replace what it wrote before.

    Args:
        options: The options of the run.
        path: The file; None: no file is asked for.
        flag: The flag that names the file.
        suffix: The required end of the name.

    Raises:
        UserError: The file cannot be written, or must not be replaced.
    """
    if path is None:
        return
    given = options.values().values()
    texts = [text for value in given for text in (value if isinstance(value, list) else [value])]
    inputs = [text for text in texts if isinstance(text, str) and text and text != path]
    check_target(
        path,
        flag,
        suffix=suffix,
        overwrite=options.overwrite,
        inputs=inputs,
        run_folder=options.output_dir,
        replace_own=not options.evaluate,
        make_folder=True,
    )


def write_of_run(options: "TrainingOptions", path: str, content: bytes, flag: str) -> None:
    """Write a file that a flag of a run names, and remember that a training wrote it.

    An evaluation does not remember its files, so that it never replaces a file without being asked.

    Args:
        options: The options of the run.
        path: The file.
        content: The content.
        flag: The flag that names the file.

    Raises:
        UserError: The file cannot be written.
    """
    write_whole(path, content, flag)
    if options.evaluate:
        return
    try:
        remember_target(options.output_dir, path)
    except OSError as e:
        raise UserError(f"--output-dir {options.output_dir}: cannot be written ({e.strerror}); free space") from e


def write_whole(path: str | os.PathLike, content: bytes, flag: str) -> None:
    """Write a file that a flag asked for, whole or not at all.

    Args:
        path: The file.
        content: The content.
        flag: The flag that names the file.

    Raises:
        UserError: The file cannot be written.
    """
    with written_whole(path, flag=flag, cure="choose another") as file:
        file.write(content)
