"""How programs end: their exit status, and what they say on stderr."""

import os
import socket
import subprocess
import sys

import pytest

from avion.errors import UserError, exit_status, printable, say


def raising(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_the_status_is_the_programs_own(result, status, capsys):
    assert exit_status("tools/x.py", lambda: result) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("message", ["clips.csv: row 3", "tools/x.py: clips.csv: row 3"])
def test_a_mistake_is_one_line_with_the_name_once(message, capsys):
    assert exit_status("tools/x.py", raising(UserError(message))) == 2
    assert capsys.readouterr() == ("", "tools/x.py: error: clips.csv: row 3\n")


def test_debug_lets_a_mistake_pass(capsys):
    with pytest.raises(UserError, match="row 3"):
        exit_status("tools/x.py", raising(UserError("row 3")), debug=True)
    assert capsys.readouterr().err == ""


def test_interruption(capsys):
    assert exit_status("tools/x.py", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "tools/x.py: interrupted\n"


def test_a_defect_is_not_a_mistake_of_the_users():
    with pytest.raises(ValueError, match="ours"):
        exit_status("tools/x.py", raising(ValueError("ours")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 \\n", "plain é 日本 \\n"), ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x9b\x7f\0", r"\x1b[2J\x9b\x7f\x00"),
        ("\u2028\u202e\u2066", r"\u2028\u202e\u2066"), (os.fsdecode(b"a\xff\xfe"), r"a\xff\xfe"), ("\ud800", r"\ud800"),
    ],
)  # fmt: skip
def test_lines_are_printable(text, shown, capsys):
    assert printable(text) == shown and str(UserError(text)) == shown
    say(text, "second")
    say(text, to_stderr=True)
    assert capsys.readouterr() == (f"{shown}\nsecond\n", f"{shown}\n")


def test_long_messages_are_cut_in_the_middle():
    text = str(UserError("begin " + "x" * 10**6 + " end"))
    assert len(text) < 4100 and text.startswith("begin ") and text.endswith(" end")


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])  # torchrun starts its processes with -u
def test_lines_on_stderr_are_written_in_one_piece(unbuffered):
    """Processes that share stderr would tear each other's lines. Here stderr is a socket that shows single writes."""
    code = """
import logging
from avion.engine.console import setup_logging
from avion.engine.distributed import World
from avion.errors import exit_status, say

setup_logging(World())
logging.getLogger("avion").warning("a log line")
say("a line", to_stderr=True)
def body():
    from avion.errors import UserError
    raise UserError("a mistake")
exit_status("program", body)
"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        done = subprocess.run([sys.executable, *unbuffered, "-c", code], stderr=theirs, timeout=120)
        theirs.close()
        ours.setblocking(False)
        pieces = []
        try:
            while True:
                pieces.append(ours.recv(65536).decode())
        except (BlockingIOError, ConnectionResetError):
            pass
    assert done.returncode == 0
    assert [piece.partition(" W ")[2] or piece for piece in pieces] == [
        "a log line\n",
        "a line\n",
        "program: error: a mistake\n",
    ]
