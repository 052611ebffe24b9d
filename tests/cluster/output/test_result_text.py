"""Text from outside is shown, and has no other effect on a terminal."""

import os
import pty

import pytest

from cluster.output.result_text import counted, lines, printable, put


def test_what_is_not_printable_is_escaped() -> None:
    assert (
        printable("plain äöü 漢字\u3000\xa0🙂\n\tindented")
        == "plain äöü 漢字\u3000\xa0🙂\n\tindented"
    )
    assert (
        printable("\x1b[2J\r\x07\x9b\u202e\u2028\ud800") == r"\x1b[2J\r\x07\x9b\u202e\u2028\ud800"
    )
    assert printable("two\nlines", keep="") == r"two\nlines"


def test_a_result_has_rounded_figures_and_no_python() -> None:
    result = {
        "lr": (0.0005999996803580646, 0.0009999999857763931),
        "steps": [1, 2],
        "none": None,
        "no": [],
    }
    assert list(lines(result)) == ["lr     0.0006, 0.001", "steps  1, 2", "none   -", "no     none"]


def test_a_count_agrees_with_its_noun() -> None:
    assert [counted(number, "run") for number in (0, 1, 2, 1234)] == [
        "0 runs",
        "1 run",
        "2 runs",
        "1,234 runs",
    ]


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_text_is_escaped_at_a_terminal_only(at_terminal: bool) -> None:
    """A pipe gets a model's text, and a job's log, as it is."""
    reader, writer = pty.openpty() if at_terminal else os.pipe()
    with os.fdopen(os.dup(writer), "w") as stream:
        put("\x1b[2Jtext\n", stream)
    shown = b""
    while not shown.endswith(b"\n"):  # a terminal may give a line in pieces
        shown += os.read(reader, 100)
    assert shown == (b"\\x1b[2Jtext\r\n" if at_terminal else b"\x1b[2Jtext\n")
    for descriptor in (reader, writer):
        os.close(descriptor)
