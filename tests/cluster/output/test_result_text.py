"""Text from outside is shown, and has no other effect on a terminal."""

import os
import pty

import pytest

from cluster.commands.run_commands import _write_now
from cluster.output.result_text import printable


def test_what_is_not_printable_is_escaped() -> None:
    assert printable("plain äöü 漢字\u3000\xa0🙂\n\tindented") == "plain äöü 漢字\u3000\xa0🙂\n\tindented"
    assert printable("\x1b[2J\r\x07\x9b\u202e\u2028\ud800") == r"\x1b[2J\r\x07\x9b\u202e\u2028\ud800"
    assert printable("two\nlines", keep="") == r"two\nlines"


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_completion_is_escaped_at_a_terminal_only(at_terminal: bool) -> None:
    """A pipe gets the model's text as it is."""
    reader, writer = pty.openpty() if at_terminal else os.pipe()
    kept = os.dup(1)
    try:
        os.dup2(writer, 1)
        _write_now("\x1b[2Jtext\n")
    finally:
        os.dup2(kept, 1)
    assert os.read(reader, 100) == (b"\\x1b[2Jtext\r\n" if at_terminal else b"\x1b[2Jtext\n")
    for descriptor in (reader, writer, kept):
        os.close(descriptor)
