"""Pickles that would fill the memory or take hours, as files of data and as checkpoints, for `bombs`."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from avion.data.captions import read_narrations
from avion.data.ek100 import load_relevancy
from avion.weights.files import checkpoint_state_dict, read_checkpoint

PRIME = 2**61 - 1  # integers that are multiples of it have the hash value 0


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- pickles -------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def integers(before: bytes = b"", after: bytes = b"") -> bytes:
    """Many integers of one hash value, each with other opcodes before and after it."""
    numbers = ((PRIME * i).to_bytes(10, "little") for i in range(1, 150_000))
    return b"".join(before + pickle.LONG1 + b"\x0a" + number + after for number in numbers)


def name(module: str, function: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{function}\n".encode()


def pickles() -> Iterator[tuple[str, bytes]]:
    """Bodies that make one value; they may stand where a pickle begins, or inside of a larger one."""
    many = integers()
    yield "a dict of colliding keys", b"}(" + integers(after=b"N") + b"u"
    yield "a dict of colliding keys, key by key", b"}" + integers(after=b"Ns")
    yield "a dict of colliding keys, the older way", b"(" + integers(after=b"N") + b"d"
    yield "a set of colliding keys", b"\x8f(" + many + b"\x90"
    yield "a frozenset of colliding keys", b"(" + many + b"\x91"
    yield "a set of an older protocol", name("__builtin__", "set") + b"](" + many + b"e\x85R"
    pairs = b"](" + integers(after=b"N\x86") + b"e"
    yield "an OrderedDict of colliding keys", name("collections", "OrderedDict") + pairs + b"\x85R"
    yield "a key that takes 2^60 steps", b"}N" + b"2\x86" * 60 + b"Ns"
    yield "a key of two to the sixtieth, in a set", b"\x8f(N" + b"2\x86" * 60 + b"\x90"
    yield "the largest index of the memo", b"Nr\xff\xff\xff\xff"
    yield "the largest index of the memo, in digits", b"Np4294967295\n"
    yield "an index of the memo that is negative", b"Np-1\n"
    yield "lists in lists", b"]" * 500_000 + b"a" * 499_999
    yield "tuples in tuples", b"N" + b"\x85" * 500_000
    yield (
        "lists in lists by the memo",
        b"]\x94" + b"".join(b"]\x94j" + struct.pack("<I", i) + b"a" for i in range(100_000)),
    )
    yield "an integer of a million bytes", pickle.LONG4 + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20)
    yield "an integer of a million digits", b"L" + b"7" * 1_000_000 + b"L\n"
    yield "an integer of a million digits, the older way", b"I" + b"7" * 1_000_000 + b"\n"
    yield "a text longer than the file", b"\x8d" + struct.pack("<Q", 1 << 40)
    yield "bytes longer than the file", b"\x8e" + struct.pack("<Q", 1 << 40)
    yield "a bytearray longer than the file", b"\x96" + struct.pack("<Q", 1 << 40)
    encode = name("_codecs", "encode")
    yield (
        "one text encoded a hundred thousand times",
        (
            text("x" * 1_000_000)
            + b"q\x00"
            + text("latin1")
            + b"q\x01"
            + encode
            + b"q\x02]"
            + b"("
            + b"h\x02h\x00h\x01\x86R" * 100_000
            + b"e"
        ),
    )
    for opcode in (
        b"\x82\x01",
        b"\x83\x01\x00",
        b"i__builtin__\nlist\n",
        b"(" + name("builtins", "list") + b"o",
        b"\x97",
    ):
        yield f"the opcode {opcode[:1]!r}", b"(" * (opcode[:1] == b"i") + opcode


def array(shape: bytes, dtype: str, raw: bytes) -> bytes:
    made = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85" + b"C\x01b\x87R"
    kind = (
        name("numpy", "dtype")
        + text(dtype)
        + b"\x89\x88\x87R(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return made + b"(K\x01" + shape + kind + b"\x89" + raw + b"tb"


_TERA = pickle.LONG1 + b"\x06" + (10**12).to_bytes(6, "little")


def data_pickles() -> Iterator[tuple[str, Callable[[Path], object]]]:
    bodies = [
        *pickles(),
        ("an array of 10^12 numbers", array(_TERA + b"\x85", "u1", b"C\x00")),
        ("an array of 10^12 empty texts", array(_TERA + b"\x85", "S0", b"C\x00")),
        ("an array of 0 times 10^12 numbers", array(b"K\x00" + _TERA + b"\x86", "u1", b"C\x00")),
        (
            "one megabyte in ten thousand arrays",
            b"\x8e"
            + struct.pack("<Q", 10**6)
            + bytes(10**6)
            + b"q\x00]("
            + array(pickle.BININT + struct.pack("<i", 10**6) + b"\x85", "u1", b"h\x00") * 10_000
            + b"e",
        ),
    ]
    for what, body in bodies:
        content = b"\x80\x04" + body + b"."
        yield f"narrations: {what}", lambda folder, c=content: read_narrations([written(folder, "a.pkl", c)])
        yield f"relevancy: {what}", lambda folder, c=content: load_relevancy(written(folder, "a.pkl", c), 2, 2)
    for what, row in (
        ("one text in all rows", b"(h\x01h\x02h\x02h\x00t"),
        ("a list of one text in all rows", b"(h\x01h\x02h\x02](h\x00h\x00h\x00h\x00eh\x00t"),
    ):
        start = text("x" * 99_000) + b"q\x00" + text("video") + b"q\x01K\x01q\x02"
        content = b"\x80\x04" + start + b"](" + row * 100_000 + b"e."
        yield f"narrations: {what}", lambda folder, c=content: read_narrations([written(folder, "a.pkl", c)])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def archive(folder: Path, body: bytes, **more: tuple[bytes, int]) -> Path:
    """A checkpoint as `torch.save` lays it out, with this pickle, and other entries with their kind of compression."""
    path = folder / "checkpoint.pt"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/data.pkl", b"\x80\x02" + body + b".")
        for entry, (content, compression) in {"version": (b"3\n", 0), "byteorder": (b"little", 0), **more}.items():
            zipped.writestr(f"a/{entry}", content, compression)
    return path


def storage(numel: bytes, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text("0") + text("cpu") + numel + b"tQ"


def tensor(numel: bytes, size: bytes, stride: bytes) -> bytes:
    args = b"(" + storage(numel) + b"K\x00" + size + stride + b"\x89" + name("collections", "OrderedDict") + b")Rt"
    return name("torch._utils", "_rebuild_tensor_v2") + args + b"R"


def contents(field: str, value: bytes) -> bytes:
    """A dict with weights that are right, and `value` in a field of its own or among the weights."""
    right = tensor(b"K\x04", b"K\x04\x85", b"K\x01\x85")
    if field == "state_dict":
        return b"}" + text("state_dict") + b"}" + text("w") + value + b"ss"
    return b"}" + text("state_dict") + b"}" + text("w") + right + b"ss" + text(field) + value + b"s"


def opcodes() -> Iterator[tuple[str, bytes]]:
    """Two megabytes of nothing but opcodes, each of which takes a reader in Python a microsecond."""
    many = 2_000_000
    yield "two million opcodes that make a tuple", b"(" + b"N" * many + b"t"
    yield "a million opcodes that come and go", b"N0" * (many // 2) + b"N"
    yield "a million marks", b"(1" * (many // 2) + b"N"
    yield "a million lists that come and go", b"]0" * (many // 2) + b"]"
    yield "a million looks into the memo", b"Nq\x000" + b"h\x000" * (many // 3) + b"N"


def weights(path: Path) -> object:
    return checkpoint_state_dict(read_checkpoint(path), path)


def checkpoints() -> Iterator[tuple[str, Callable[[Path], object]]]:
    data = {"data/0": (bytes(16), 0)}
    bodies = [
        *pickles(),
        *opcodes(),
        ("a bytearray of 10^12", name("__builtin__", "bytearray") + _TERA + b"\x85R"),
        ("a tensor by its size alone", name("torch", "FloatTensor") + b"J\x00\xca\x9a\x3b\x85R"),
        ("a tensor of stride 0", tensor(b"K\x04", _TERA + b"\x85", b"K\x00\x85")),
        ("a tensor of 10^12 numbers", tensor(_TERA, _TERA + b"\x85", b"K\x01\x85")),
    ]
    for what, body in bodies:
        for field in ("args", "optimizer", "state_dict"):

            def light(folder: Path, field: str = field, body: bytes = body) -> object:
                return weights(archive(folder, contents(field, body), **data))

            if "index of the memo" not in what or field == "state_dict":  # a dict holds any index: it reads on
                yield f"{what} in {field}", light
    for entry in ("data/0", "byteorder", "version", "data.pkl.more", ".data/serialization_id"):
        zeros = {**data, entry: (bytes(300_000_000), zipfile.ZIP_DEFLATED)}
        body = contents("epoch", b"K\x01")
        yield f"{entry} that unpacks to 300 MB", lambda folder, z=zeros, b=body: weights(archive(folder, b, **z))
    body = contents("epoch", b"K\x01")
    yield "entries that lie over each other", lambda folder: weights(_overlapping(archive(folder, body, **data)))
    header = json.dumps({"w": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}).encode()
    for what, content in (
        ("a safetensors file of 10^12 numbers", struct.pack("<Q", len(header)) + header),
        ("a safetensors file with a header of 10^12 bytes", struct.pack("<Q", 10**12) + header),
        ("a safetensors file with a deep header", struct.pack("<Q", 400_000) + b"[" * 200_000 + b"]" * 200_000),
    ):
        yield what, lambda folder, c=content: weights(written(folder, "a.safetensors", c))


def _overlapping(path: Path) -> Path:
    """Every entry of the directory says that it holds the whole file."""
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 20 : at + 28] = struct.pack("<II", len(content), len(content))
        at = content.find(b"PK\x01\x02", at + 1)
    path.write_bytes(bytes(content))
    return path


def old_checkpoints() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Files of before PyTorch 1.6: pickles one after the other."""
    begin = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for what, body in [*pickles(), *opcodes()]:
        content = begin + b"\x80\x02}" + text("args") + body + b"s."
        if "index of the memo" not in what:
            yield what, lambda folder, c=content: weights(written(folder, "old.pt", c))


# --- texts ---------------------------------------------------------------------------------------------------------
