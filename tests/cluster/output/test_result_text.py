"""Text from outside is shown, and has no other effect on a terminal."""

import os
import pty

import pytest

from cluster.output.result_text import printable, put


def test_what_is_not_printable_is_escaped() -> None:
    assert printable("plain äöü 漢字\u3000\xa0🙂\n\tindented") == "plain äöü 漢字\u3000\xa0🙂\n\tindented"
    assert printable("\x1b[2J\r\x07\x9b\u202e\u2028\ud800") == r"\x1b[2J\r\x07\x9b\u202e\u2028\ud800"
    assert printable("two\nlines", keep="") == r"two\nlines"


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_text_is_escaped_at_a_terminal_only(at_terminal: bool) -> None:
    """A pipe gets a model's text, and a job's log, as it is."""
    reader, writer = pty.openpty() if at_terminal else os.pipe()
    with os.fdopen(os.dup(writer), "w") as stream:
        put("\x1b[2Jtext\n", stream)
    assert os.read(reader, 100) == (b"\\x1b[2Jtext\r\n" if at_terminal else b"\x1b[2Jtext\n")
    for descriptor in (reader, writer):
        os.close(descriptor)
