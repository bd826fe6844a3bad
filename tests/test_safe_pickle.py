import _codecs
import collections
import gc
import io
import os
import pathlib
import pickle
import pickletools
import struct

import numpy as np
import pytest

from avion.errors import UserError
from avion.pickle_scan import holds_rows_only
from avion.safe_pickle import load_pickle


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    return path


@pytest.fixture
def load(tmp_path):
    def load(data):
        return load_pickle(write(tmp_path / "x.pkl", data), "data")

    return load


class Runs:
    """A pickle of this calls `function(*args)` when it is loaded by the plain pickle module."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class TestPlainData:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_containers_numbers_texts(self, load, protocol):
        value = {
            "rows": [("uid", 1.5, 2, "text ü"), ("uid", 0.0, 10**30, ["a", "b"])],
            "other": (None, True, b"bytes \xff", b"", {1, 2}, frozenset("ab"), collections.OrderedDict(a=1)),
        }
        assert load(pickle.dumps(value, protocol)) == value

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool", ">f4", "<U5", "S3"])
    def test_arrays(self, load, protocol, dtype):
        array = (np.random.default_rng().random((3, 4)) * 100).astype(dtype)
        for value in (array, np.asfortranarray(array), array[0, 0], array[:0]):
            data = pickle.dumps(value, protocol)
            loaded = load(data)
            np.testing.assert_array_equal(loaded, value)
            # numpy itself turns some to the machine's byte order
            assert loaded.dtype == pickle.loads(data).dtype and type(loaded) is type(value)

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_arrays_of_both_numpy_generations(self, load, protocol):
        """numpy 1.x writes numpy.core, numpy 2.x numpy._core. Text opcodes carry their length, so the name is
        swapped in a disassembly, not in bytes."""
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        here = pickle.dumps(array, protocol)
        module = "numpy._core" if b"numpy._core" in here else "numpy.core"
        other = {"numpy._core": "numpy.core", "numpy.core": "numpy._core"}[module]
        assert _renamed(here, module, other) != here
        for data in (here, _renamed(here, module, other)):
            np.testing.assert_array_equal(load(data), array)

    def test_arrays_inside_containers(self, load):
        loaded = load({"a": [np.arange(3), np.float64(2.5)]})
        assert loaded["a"][0].tolist() == [0, 1, 2] and loaded["a"][1] == 2.5

    def test_a_loaded_array_is_ordinary(self, load):
        loaded = load(np.eye(2))
        assert type(loaded) is np.ndarray
        loaded[0, 0] = 5
        assert loaded.flags.writeable and loaded.sum() == 6


def _renamed(data: bytes, old: str, new: str) -> bytes:
    """`data` with the module prefix `old` replaced, string lengths and frames put right."""
    out, position = b"", 0
    operations = [(op, arg, at) for op, arg, at in pickletools.genops(data)]
    for (op, arg, at), following in zip(operations, operations[1:] + [(None, None, len(data))], strict=True):
        raw = data[at : following[2]]
        if op.name == "FRAME":
            raw = b""
        elif isinstance(arg, str) and arg.startswith(old + "."):
            changed = arg.replace(old, new, 1)
            if op.name == "GLOBAL":
                raw = b"c" + changed.replace(" ", "\n").encode() + b"\n"
            elif op.name == "SHORT_BINUNICODE":
                raw = b"\x8c" + bytes([len(changed)]) + changed.encode()
        out, position = out + raw, following[2]
    assert position == len(data)
    return out


class TestCode:
    def test_nothing_is_run(self, load, tmp_path):
        mark = tmp_path / "was_here"
        for call in (
            Runs(os.system, f"touch {mark}"),
            Runs(eval, f"open({str(mark)!r}, 'w')"),
            Runs(open, str(mark), "w"),
        ):
            for value in (call, [1, call], {"a": (call,)}, [("uid", 0.0, 1.0, call)]):
                with pytest.raises(UserError, match="not plain data; it was not loaded") as caught:
                    load(value)
                assert "\n" not in str(caught.value) and "x.pkl" in str(caught.value)
        assert not mark.exists()

    def test_what_is_refused_is_named(self, load):
        with pytest.raises(UserError, match="holds posix.system"):
            load(Runs(os.system, "true"))
        with pytest.raises(UserError, match="holds pathlib"):
            load(pathlib.PurePosixPath("a"))
        with pytest.raises(UserError, match="reference to outside data"):
            load(b"\x80\x04\x8c\x01aQ.")

    @pytest.mark.parametrize(
        "value",
        [
            np.array([{"a": 1}, None], dtype=object),
            np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
            np.array(["2020-01-01"], dtype="datetime64[D]"),
            np.zeros(2, dtype="V8"),
            np.ma.masked_array([1, 2], [0, 1]),
            Runs(bytes, 10**9),
            Runs(bytearray, 10),
            Runs(np.frombuffer, b"12345678"),
            Runs(np.dtype, "O"),
            Runs(np.ndarray, (10**9,)),
            Runs(_codecs.encode, "a", "rot13"),
        ],
    )
    def test_other_arrays_and_calls_are_refused(self, load, value):
        with pytest.raises(UserError, match="x.pkl"):
            load(value)

    def test_array_states_that_lie(self, load):
        reconstruct = np.zeros(1).__reduce__()[0]

        class Lying:
            def __init__(self, shape, dtype, raw):
                self.state = (1, shape, dtype, False, raw)

            def __reduce__(self):
                return reconstruct, (np.ndarray, (0,), b"b"), self.state

        f8 = np.dtype("f8")
        for shape, raw in (((10**12,), b""), ((2,), bytes(8)), ((-1,), bytes(8)), (("a",), bytes(8)), (3, bytes(24))):
            with pytest.raises(UserError, match="numpy array"):
                load(Lying(shape, f8, raw))
        with pytest.raises(UserError, match="numpy array"):
            load(Lying((1,), f8, [1]))
        assert load(Lying((1,), f8, bytes(8))).tolist() == [0.0]


class TestDamage:
    def test_every_truncation_is_told(self, tmp_path):
        data = pickle.dumps([("uid", 1.0, 2.0, "text"), np.arange(5.0)])
        path = tmp_path / "cut.pkl"
        for length in range(len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(UserError, match="cut.pkl") as caught:
                load_pickle(path, "narrations")
            assert "\n" not in str(caught.value)

    def test_random_damage_is_told_or_harmless(self, tmp_path):
        rng, path = np.random.default_rng(), tmp_path / "noise.pkl"
        data = pickle.dumps([("uid", 1.0, 2.0, "text")] * 20 + [np.arange(5.0)])
        for _ in range(300):
            noisy = bytearray(data)
            for _ in range(3):
                noisy[rng.integers(len(noisy))] = rng.integers(256)
            if b"r" in noisy or b"j" in noisy:  # memo numbers of four bytes: sizes of the next test
                continue
            path.write_bytes(bytes(noisy))
            try:
                load_pickle(path, "narrations")
            except UserError as error:
                assert "\n" not in str(error)

    @pytest.mark.parametrize(
        "bomb",
        [
            b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",  # BINBYTES8
            b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",  # BINUNICODE8
            b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",  # BYTEARRAY8
            b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",  # LONG4
            b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",  # FRAME
        ],
        ids=["bytes", "text", "bytearray", "long", "frame"],
    )
    def test_sizes_that_cannot_be(self, load, bomb):
        with pytest.raises(UserError, match="x.pkl"):
            load(bomb)

    def test_files_that_are_no_pickle(self, load, tmp_path):
        for data in (b"", b"narration_id,video\n", bytes(100), b"PK\x03\x04", os.urandom(200)):
            with pytest.raises(UserError, match="data .*x.pkl"):
                load(data)
        with pytest.raises(UserError, match="no such file"):
            load_pickle(tmp_path / "gone.pkl", "data")
        with pytest.raises(UserError, match="cannot be read"):
            load_pickle(tmp_path, "data")

    def test_collection_is_switched_on_again(self, load):
        assert gc.isenabled()
        load([1])
        with pytest.raises(UserError):
            load(b"")
        assert gc.isenabled()

    def test_only_the_file_is_read(self, tmp_path):
        """Two pickles in one file: the first counts, as with pickle.load."""
        path = tmp_path / "two.pkl"
        path.write_bytes(pickle.dumps([1]) + pickle.dumps([2]))
        assert load_pickle(path, "data") == [1] == pickle.load(io.BytesIO(path.read_bytes()))


class TestBounds:
    """`tests/endurance/bombs.py` holds many more, and measures what they cost."""

    def test_the_two_readers_agree(self, load):
        """Rows take the reader in C, the same rows beside a dict the other one."""
        rng = np.random.default_rng()
        rows = [(f"v{i % 7}", float(rng.random()), int(rng.integers(1 << 40)), [f"text {i}"] * 2) for i in range(50)]
        rows.append(("v", np.float64(1.5), rng.random((2, 3)).tolist(), ["ü" * 300]))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert load(pickle.dumps(rows, protocol)) == rows
            assert load(pickle.dumps({"rows": rows}, protocol)) == {"rows": rows}
            plain = [row[:3] for row in rows[:-1]]
            assert holds_rows_only(pickle.dumps(plain, protocol)) == (protocol >= 2)
            assert not holds_rows_only(pickle.dumps({1: plain}, protocol))

    @pytest.mark.parametrize(
        "keys", [[2**61 - 1], [-(2**61)], [(1, (2, 3))], [tuple(range(21))], [(i,) for i in range(1001)]]
    )
    def test_keys_that_can_be_made_to_collide(self, load, keys):
        for value in (dict.fromkeys(keys), set(keys), [frozenset(keys)], collections.OrderedDict.fromkeys(keys)):
            with pytest.raises(UserError, match="key"):
                load(value)

    def test_keys_that_are_plain(self, load):
        keys = [2**61 - 2, -5, 1.5, "a", b"b", None, True, (1, "a")]
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert load(pickle.dumps(dict.fromkeys(keys), protocol)) == dict.fromkeys(keys)

    def test_copies_are_counted(self, load):
        encode = b"c_codecs\nencode\nq\x01" + b"X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\x02"
        call = b"h\x01h\x02\x8c\x06latin1\x86R"
        assert len(load(b"\x80\x04(" + encode + call + b"t.")[-1]) == 10**6
        with pytest.raises(UserError, match="more data than the file is long"):
            load(b"\x80\x04(" + encode + call * 10 + b"t.")

    def test_no_object_gets_attributes(self, load):
        """BUILD would set them on whatever it finds, even on the functions of this project."""
        for target in (
            b"c_codecs\nencode\n",
            b"cnumpy\nndarray\n",
            b"cnumpy\ndtype\n",
            b"ccollections\nOrderedDict\n)R",
        ):
            for state in (b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"):
                with pytest.raises(UserError, match="x.pkl"):
                    load(b"\x80\x02" + target + state + b"b.")

    def test_depth(self, load):
        with pytest.raises(UserError, match="more than 100 deep"):
            load(b"\x80\x04" + b"]" * 1000 + b"a" * 999 + b".")
