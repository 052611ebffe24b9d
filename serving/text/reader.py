"""Reads conversations and texts as tokens for a served checkpoint: in this process, or where its tokenizer or chat
template is a stranger's program, in a bounded one.

A template may loop for ever, or fill the memory with one multiplication; a tokenizer.json may hold a regular expression
that backtracks. In a thread of the replica either would hold up every stream.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from model.chat import PLAIN_TEMPLATE, Chat, Message
from model.errors import UserError
from model.tokenizer import NORMALIZERS, Tokenizer, chat_format, load_tokenizer
from serving.engine_process.child_process import Child, kill_child, start_child
from serving.text.chat_probe import ChatProbe, probe_of

MODULE = "serving.text.run_text"
LOAD_CPU_S = 60.0  # processor time in which the process reads the tokenizer and writes the probes
REQUEST_CPU_S = 3.0  # processor time of one request; a megabyte of text takes half a second
MEMORY_BYTES = 2 << 30  # of address space; a tokenizer of 256,000 tokens takes a fourth of it
WALL_FACTOR = 20.0  # times the processor time: for a process that waits for a processor, or does nothing
PLAIN_TOKENIZER_BYTES = 64 << 20  # a larger tokenizer.json is read in the bounded process first

Texts = list[str] | list[list[int]]


class TextError(UserError):
    """The checkpoint's own template or tokenizer refuses a text, fails, or exceeds its bounds."""


class TextReader(Protocol):
    """What turns text into tokens for one loaded version."""

    probe: ChatProbe

    async def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens that the assistant's next answer follows. Raises `TextError`."""

    async def encoded(self, texts: Texts, *, add_special_tokens: bool) -> Texts:
        """Returns the texts as tokens, or as they are where `ServedModel` may turn them into tokens itself. Raises
        `TextError`."""

    def close(self) -> None: ...


class TrustedReader:
    """The reader of raymill's own programs: byte-level BPE with GPT-2's pattern, and the plain chat template."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._chat = None if tokenizer is None else Chat(tokenizer)
        is_chat_tuned = tokenizer is not None and tokenizer.chat is not None
        nothing = ChatProbe(is_chat_tuned=False, hashes={}, refusals={}, end_of_turn=None)
        self.probe = nothing if self._chat is None else probe_of(self._chat, is_chat_tuned=is_chat_tuned)

    async def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        assert self._chat is not None
        return await asyncio.to_thread(self._chat.prompt_ids, messages)

    async def encoded(self, texts: Texts, *, add_special_tokens: bool) -> Texts:
        return texts

    def close(self) -> None: ...


class BoundedReader:
    """The reader of a stranger's programs. Its process takes one request at a time, and is replaced after one that
    exceeds the bounds."""

    probe: ChatProbe

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._child: Child | None = None  # it ends when its socket closes, and so when the replica dies
        self._turn = asyncio.Lock()
        self._is_closed = False

    async def start(self) -> None:
        """Starts the process. Raises `TextError` if it cannot read the tokenizer within its bounds."""
        arguments = {
            "folder": str(self._folder),
            "load_cpu_s": LOAD_CPU_S,
            "request_cpu_s": REQUEST_CPU_S,
            "memory_bytes": MEMORY_BYTES,
            "threads": 1,
        }
        child = await start_child(MODULE, arguments)
        try:
            first = await self._answer(child, b"", cpu_s=LOAD_CPU_S)
        except BaseException:
            kill_child(child)
            raise
        self.probe, self._child = ChatProbe(**first["probe"]), child

    async def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        answer = await self._ask({"messages": list(messages)})
        return list(answer["ids"])

    async def encoded(self, texts: Texts, *, add_special_tokens: bool) -> Texts:
        if not isinstance(texts[0], str):
            return texts
        answer = await self._ask({"texts": texts, "add_special_tokens": add_special_tokens})
        return list(answer["ids"])

    def close(self) -> None:
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if self._child is not None:
            kill_child(self._child)
            self._child = None

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = await asyncio.to_thread(orjson.dumps, request)
        async with self._turn:
            if self._is_closed:
                raise TextError("this version is not served any more")
            if self._child is None:
                await self.start()
            assert self._child is not None
            try:
                return await self._answer(self._child, line, cpu_s=REQUEST_CPU_S)
            except TextError:
                if self._child.process.poll() is not None:
                    self._end()
                raise
            except BaseException:  # the rest of a half-read answer must not become the next one's
                self._end()
                raise

    async def _answer(self, child: Child, line: bytes, *, cpu_s: float) -> dict[str, Any]:
        """Sends a line, unless it is empty, and returns the answer. Raises `TextError`."""
        try:
            async with asyncio.timeout(WALL_FACTOR * cpu_s):
                if line:
                    child.writer.write(line + b"\n")
                answer = await child.reader.readuntil()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            kill_child(child)
            raise TextError(
                f"the checkpoint's chat template or tokenizer was ended: a text may take {cpu_s:g} s of processor "
                f"time and {MEMORY_BYTES >> 30} GiB of memory"
            ) from None
        values: dict[str, Any] = await asyncio.to_thread(json.loads, answer)
        if "error" in values:
            raise TextError(values["error"])
        return values


async def open_reader(folder: Path) -> TextReader:
    """Returns the reader of a checkpoint's folder. Nothing but it has run a stranger's program until then. Raises
    `TextError`, and `CheckpointError` for a folder without a tokenizer that should have one."""
    if await asyncio.to_thread(has_strange_programs, folder):
        reader = BoundedReader(folder)
        await reader.start()
        return reader
    return TrustedReader(await asyncio.to_thread(load_tokenizer, folder))


async def require_bounded_text(folder: Path) -> None:
    """Raises `TextError` if the folder's tokenizer and template exceed their bounds before any request."""
    (await open_reader(folder)).close()


def has_strange_programs(folder: Path) -> bool:
    """Tells whether a checkpoint has a chat template or a pattern of its own. Looks only, and runs nothing."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return False
    if path.stat().st_size > PLAIN_TOKENIZER_BYTES:
        return True
    content = json.loads(path.read_bytes())
    chat = chat_format(lambda name: (folder / name).read_bytes() if (folder / name).exists() else None)
    if chat is not None and chat.chat_template != PLAIN_TEMPLATE:
        return True
    splits = content.get("pre_tokenizer") or {}
    if splits.get("type") != "ByteLevel" or not splits.get("use_regex", True):
        return True
    return not _is_known_normalizer(content.get("normalizer"))


def _is_known_normalizer(content: Any) -> bool:
    if content is None:
        return True
    if content.get("type") == "Sequence":
        return all(map(_is_known_normalizer, content["normalizers"]))
    known = [json.loads(step.__getstate__()) for step in NORMALIZERS.values()]
    return content in known
