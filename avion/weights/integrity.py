"""Whether a checkpoint is still what was written: the checksums in a file of `torch.save`.

PyTorch maps the tensors of a file into memory and never compares them with the checksums beside them, so zeros or a
flipped bit in the middle of the weights would be trained on without a word. Here every record of the zip archive is
compared with its CRC-32, by a few threads: 0.25 s of CPU time per GB (zlib on an x86 server), or as long as the disk
takes to read the file.
"""

import mmap
import os
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from avion.errors import UserError

_CHUNK = 1 << 24
_THREADS = 4
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
# torch.save compresses nothing; torch.jit.save compresses the code of a model, which is never looked at.
_LARGEST_COMPRESSED = 64 << 20


def check_integrity(file: IO[bytes], path: Path) -> None:
    """Compare a file of `torch.save` with the checksums in it.

    A file of the format from before PyTorch 1.6, a safetensors file and a file that says nothing else have no
    checksums: their readers notice a wrong length, and nothing more can be known.

    Args:
        file: The open file.
        path: The path of the file, for its suffix and for messages.

    Raises:
        UserError: The file is damaged: it is not what was written.
    """
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = _damaged(file, archive)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError) as e:
        raise _damage(path, f"it is no whole zip archive: {' '.join(str(e).split())}") from e
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise _damage(path, f"the checksum of its record {ascii(damaged[0])}{more} is wrong")


def _damage(path: Path, found: str) -> UserError:
    return UserError(f"{path}: the file is damaged ({found}): fetch it again, or take another checkpoint")


def _damaged(file: IO[bytes], archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the records that are not what was written."""
    entries = [entry for entry in archive.infolist() if entry.file_size > 0]
    if all(entry.CRC == 0 for entry in entries):
        return []  # written after torch.serialization.set_crc32_options(False), without checksums
    stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    wrong = [entry.filename for entry in entries if entry not in stored and not _compressed_is_whole(archive, entry)]
    if sum(entry.file_size for entry in stored) > os.fstat(file.fileno()).st_size:
        raise ValueError("its records overlap")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with memoryview(content) as view, ThreadPoolExecutor(_THREADS) as threads:
            # Large records first, so that no thread is left with one of them at the end.
            order = sorted(stored, key=lambda entry: -entry.file_size)
            sums = threads.map(lambda entry: _checksum(view, entry), order)
            wrong += [entry.filename for entry, found in zip(order, sums, strict=True) if found != entry.CRC]
    return wrong


def _checksum(view: memoryview, entry: zipfile.ZipInfo) -> int:
    """Compute the CRC-32 of the bytes that PyTorch takes for a record, in chunks, so that few pages are needed at a
    time.
    """
    offset, size = entry.header_offset, _LOCAL_HEADER.size
    signature, *_, name, extra = _LOCAL_HEADER.unpack(view[offset : offset + size])
    first = offset + size + name + extra
    if signature != b"PK\x03\x04" or first + entry.file_size > len(view) or entry.file_size != entry.compress_size:
        return -1
    found = 0
    for begin in range(first, first + entry.file_size, _CHUNK):
        found = zlib.crc32(view[begin : min(begin + _CHUNK, first + entry.file_size)], found)
    return found


def _compressed_is_whole(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    if entry.file_size > _LARGEST_COMPRESSED:
        return True  # nothing reads such a record
    try:
        with archive.open(entry) as record:
            while record.read(1 << 20):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False
    return True
