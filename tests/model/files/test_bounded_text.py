"""What a stranger's template writes, and an end to one that does not end, without a thread or an
event loop."""

from pathlib import Path

import pytest

from model.files.bounded_text import (
    Bounds,
    TextError,
    bounded_probe,
    has_strange_programs,
    read_from,
    require_bounded_text,
)
from model.files.stored_tokenizer import load_tokenizer
from model.text.chat import Chat
from model.text.chat_probe import probe_of
from tests.checkpoints import write_tiny

GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "step-1")
    return tmp_path / "step-1"


def test_the_process_writes_what_this_one_would(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(GOOD)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and has_strange_programs(read_from(folder))
    probe = bounded_probe(folder)
    assert probe == probe_of(Chat(tokenizer), is_chat_tuned=True)
    assert probe.end_of_turn == tokenizer.eot_id and not probe.refusals


def test_one_that_does_not_end_is_ended(folder: Path) -> None:
    require_bounded_text(folder)  # raymill's own programs alone
    (folder / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(TextError, match=r"0\.5 s of processor time and 2 GiB"):
        require_bounded_text(folder, bounds=Bounds(request_cpu_s=0.5))


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_what_is_no_tokenizer_is_left_to_who_loads_it(content: bytes) -> None:
    assert not has_strange_programs({"tokenizer.json": content}.get)
