"""How programs end: their exit status, and what they say on stderr."""

import pytest

from avion.errors import UserError, exit_status


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
