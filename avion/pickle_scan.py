"""A quick look through a pickle, without reading it: whether it holds nothing but rows of plain data.

A leaf: this module imports nothing of the project.
"""

import mmap
import pickle
import struct

LONGEST_INTEGER = 16  # bytes

# Opcodes of a fixed length (with what follows them), and those whose text or bytes follow a length of so many bytes.
_OPCODES_BY_LENGTH = {
    1: (
        pickle.MARK, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_TUPLE, pickle.TUPLE,
        pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS,
        pickle.MEMOIZE, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD,
    ),
    2: (pickle.PROTO, pickle.BININT1, pickle.BINGET),
    3: (pickle.BININT2,),
    5: (pickle.BININT, pickle.LONG_BINGET),
    9: (pickle.FRAME, pickle.BINFLOAT),
}  # fmt: skip
_FIXED = bytearray(256)
for _length, _opcodes in _OPCODES_BY_LENGTH.items():
    for _opcode in _opcodes:
        _FIXED[_opcode[0]] = _length
_SIZED_1 = frozenset(b"".join((pickle.SHORT_BINUNICODE, pickle.SHORT_BINBYTES, pickle.SHORT_BINSTRING)))
_SIZED_4 = frozenset(b"".join((pickle.BINUNICODE, pickle.BINBYTES, pickle.BINSTRING)))
_SIZED_8 = frozenset(b"".join((pickle.BINUNICODE8, pickle.BINBYTES8, pickle.BYTEARRAY8)))
_STOP, _BINPUT, _LONG_BINPUT, _LONG1, _GLOBAL = (
    opcode[0] for opcode in (pickle.STOP, pickle.BINPUT, pickle.LONG_BINPUT, pickle.LONG1, pickle.GLOBAL)
)
_UINT32, _UINT64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from


def holds_rows_only(data: bytes | mmap.mmap) -> bool:
    """Return whether the reader in C can read a pickle without harm.

    Such a pickle holds only lists, tuples, numbers, texts and arrays, and numbers its memo from 0 or 1 upwards. False
    only says that the restricted reader in Python must read the pickle.

    Args:
        data: The whole pickle.

    Returns:
        True for such a pickle.
    """
    at = puts = 0
    # Millions of opcodes: the frequent ones come first, and constants are local names.
    fixed, sized_1, sized_4, binput, long_binput = _FIXED, _SIZED_1, _SIZED_4, _BINPUT, _LONG_BINPUT
    try:
        while True:
            opcode = data[at]
            length = fixed[opcode]
            if length:
                if opcode == _STOP:
                    return True
                at += length
            elif opcode in sized_1:
                at += 2 + data[at + 1]
            elif opcode == binput:
                puts += 1
                if data[at + 1] > puts:
                    return False
                at += 2
            elif opcode == long_binput:
                puts += 1
                if _UINT32(data, at + 1)[0] > puts:
                    return False
                at += 5
            elif opcode in sized_4:
                at += 5 + _UINT32(data, at + 1)[0]
            elif opcode in _SIZED_8:
                at += 9 + _UINT64(data, at + 1)[0]
            elif opcode == _LONG1 and data[at + 1] <= LONGEST_INTEGER:
                at += 2 + data[at + 1]
            elif opcode == _GLOBAL and (end := data.find(b"\n", data.find(b"\n", at) + 1)) > at:
                at = end + 1
            else:
                return False
    except (IndexError, OverflowError, struct.error):  # the file ends before the pickle does
        return False
