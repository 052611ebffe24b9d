"""Bounds what a stranger's chat template and tokenizer may do, by a process of their own
(`run_text.py`).

A template may loop for ever, or fill the memory with one multiplication; a tokenizer.json may hold
a regular expression that backtracks. Training and serving each look before they run such a program
in a process that others wait for.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.text.chat import PLAIN_TEMPLATE
from model.text.chat_probe import ChatProbe
from model.text.tokenizer import NORMALIZERS, chat_format
from raymill.errors import UserError

MODULE = "model.files.run_text"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""The files that hold such programs."""

# Times the processor time: for a process that waits for a processor, or does nothing
WALL_FACTOR = 20.0
_PLAIN_TOKENIZER_BYTES = 64 << 20  # a larger tokenizer.json is read in the bounded process first

ReadFile = Callable[[str], bytes | None]
"""Returns the content of a file by its name, None if there is none."""


class TextError(UserError):
    """The checkpoint's own template or tokenizer refuses a text, fails, or exceeds its bounds."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of the process."""

    load_cpu_s: float = 60.0  # processor time in which it reads the tokenizer
    # For each text, and for the probes; a megabyte of text takes half a second
    request_cpu_s: float = 3.0
    # Of address space; a tokenizer of 256,000 tokens takes a fourth of it
    memory_bytes: int = 2 << 30

    def exceeded(self, cpu_s: float) -> TextError:
        return TextError(
            f"the checkpoint's chat template or tokenizer was ended: a text may take {cpu_s:g} s of processor time and "
            f"{self.memory_bytes >> 30} GiB of memory"
        )


BOUNDS = Bounds()


def read_from(folder: Path) -> ReadFile:
    return lambda name: (folder / name).read_bytes() if (folder / name).exists() else None


def has_strange_programs(read: ReadFile) -> bool:
    """Tells whether a checkpoint has a chat template or a pattern of its own. Looks only, and runs
    nothing."""
    tokenizer = read("tokenizer.json")
    if tokenizer is None:
        return False
    if len(tokenizer) > _PLAIN_TOKENIZER_BYTES:
        return True
    try:
        content = json.loads(tokenizer)
    except ValueError:
        return False  # who loads it says what is wrong with it
    chat = chat_format(read)
    if chat is not None and chat.chat_template != PLAIN_TEMPLATE:
        return True
    splits = content.get("pre_tokenizer") or {}
    if splits.get("type") != "ByteLevel" or not splits.get("use_regex", True):
        return True
    return not _is_known_normalizer(content.get("normalizer"))


def require_bounded_text(folder: Path, *, bounds: Bounds = BOUNDS) -> None:
    """Raises `TextError` if a folder's tokenizer and template exceed their bounds before any
    request. Nothing but this has run a stranger's program until then."""
    if has_strange_programs(read_from(folder)):
        bounded_probe(folder, bounds=bounds)


def bounded_probe(folder: Path, *, bounds: Bounds = BOUNDS) -> ChatProbe:
    """Returns what the process makes of a folder. Raises `TextError` if it does not end within its
    bounds, or cannot read the tokenizer."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            arguments = json.dumps({"socket": theirs.fileno(), **process_arguments(folder, bounds)})
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, arguments],
                cwd=Path(__file__).resolve().parents[1],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
            )
        try:
            with ours.makefile("rb") as lines:
                answers = []
                for cpu_s in (bounds.load_cpu_s, bounds.request_cpu_s):
                    ours.settimeout(WALL_FACTOR * cpu_s)
                    line = lines.readline()
                    if not line.endswith(b"\n"):
                        raise bounds.exceeded(cpu_s)
                    answers.append(checked_answer(line))
        except (TimeoutError, ConnectionError):
            raise bounds.exceeded(cpu_s) from None
        finally:
            process.kill()
            process.wait()
    return ChatProbe(**answers[-1]["probe"])


def process_arguments(folder: Path, bounds: Bounds) -> dict[str, Any]:
    """Returns what the process is told, besides its end of the socket."""
    return {"folder": str(folder.absolute()), "bounds": asdict(bounds)}


def checked_answer(line: bytes) -> dict[str, Any]:
    """Returns an answer of the process. Raises `TextError` if it is an error."""
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise TextError(answer["error"])
    return answer


def _is_known_normalizer(content: Any) -> bool:
    if content is None:
        return True
    if content.get("type") == "Sequence":
        return all(map(_is_known_normalizer, content["normalizers"]))
    known = [json.loads(step.__getstate__()) for step in NORMALIZERS.values()]
    return content in known
