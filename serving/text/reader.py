"""Reads conversations and texts as tokens for a served checkpoint: in this process, or where its
tokenizer or chat template is a stranger's program, in a bounded one.

In a thread of the replica such a program would hold up every stream.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import orjson

from model.files.bounded_text import (
    BOUNDS,
    MODULE,
    WALL_FACTOR,
    Bounds,
    TextError,
    checked_answer,
    has_strange_programs,
    process_arguments,
    read_from,
)
from model.files.stored_tokenizer import load_tokenizer
from model.text.chat import Chat, Message
from model.text.chat_probe import ChatProbe, probe_of
from model.text.tokenizer import PromptEncoding, Tokenizer
from serving.engine_process.child_process import Child, kill_child, start_child
from serving.text.bounded_process import BoundedProcess, ClosedError, ExceededError, next_line

Texts = list[str] | list[list[int]]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class TextReader(Protocol):
    """The tokenizer of one loaded version."""

    probe: ChatProbe

    async def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> list[int]:
        """Returns the tokens that the assistant's next answer follows, which may call one of the
        tools; `template_kwargs` are further variables of the template. Raises `TextError`."""

    async def encoded(self, texts: Texts, how: PromptEncoding) -> Texts:
        """Returns the texts as tokens, or as they are where `ServedModel` may turn them into tokens
        itself. Raises `TextError`."""

    def close(self) -> None: ...


class TrustedReader:
    """The reader of raymill's own programs: byte-level BPE with GPT-2's pattern, and the plain chat
    template."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._chat = None if tokenizer is None else Chat(tokenizer)
        is_chat_tuned = tokenizer is not None and tokenizer.chat is not None
        nothing = ChatProbe(is_chat_tuned=False, hashes={}, refusals={}, end_of_turn=None)
        self.probe = (
            nothing if self._chat is None else probe_of(self._chat, is_chat_tuned=is_chat_tuned)
        )

    async def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> list[int]:
        assert self._chat is not None
        return await asyncio.to_thread(self._chat.prompt_ids, messages, tools, template_kwargs)

    async def encoded(self, texts: Texts, how: PromptEncoding) -> Texts:
        return texts

    def close(self) -> None: ...


class BoundedReader:
    """The reader of a stranger's programs. Its process takes one request at a time, and is replaced
    after one that exceeds the bounds."""

    probe: ChatProbe

    def __init__(self, folder: Path, bounds: Bounds) -> None:
        self._folder, self._bounds = folder, bounds
        self._process = BoundedProcess(self._begin)

    async def start(self) -> None:
        """Starts the process. Raises `TextError` if it cannot read the tokenizer within its
        bounds."""
        await self._process.start()

    async def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> list[int]:
        asked = {"messages": list(messages), "tools": list(tools)}
        answer = await self._ask({**asked, "template_kwargs": dict(template_kwargs)})
        return list(answer["ids"])

    async def encoded(self, texts: Texts, how: PromptEncoding) -> Texts:
        if not isinstance(texts[0], str):
            return texts
        answer = await self._ask({"texts": texts, "how": asdict(how)})
        return list(answer["ids"])

    def close(self) -> None:
        self._process.close()

    async def _begin(self) -> Child:
        arguments = process_arguments(self._folder, self._bounds) | {"threads": 1}
        child = await start_child(MODULE, arguments)
        try:
            await self._heard(child, cpu_s=self._bounds.load_cpu_s)
            first = await self._heard(child, cpu_s=self._bounds.request_cpu_s)
        except BaseException:
            kill_child(child)
            raise
        self.probe = ChatProbe(**first["probe"])
        return child

    async def _heard(self, child: Child, *, cpu_s: float) -> dict[str, Any]:
        try:
            return checked_answer(await next_line(child, within_s=WALL_FACTOR * cpu_s))
        except ExceededError:
            raise self._bounds.exceeded(cpu_s) from None

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = await asyncio.to_thread(orjson.dumps, request)
        cpu_s = self._bounds.request_cpu_s
        try:
            answer = await self._process.ask(line, within_s=WALL_FACTOR * cpu_s)
        except ExceededError:
            raise self._bounds.exceeded(cpu_s) from None
        except ClosedError:
            raise TextError("this version is not served any more") from None
        return await asyncio.to_thread(checked_answer, answer)


async def open_reader(folder: Path, *, bounds: Bounds = BOUNDS) -> TextReader:
    """Returns the reader of a checkpoint's folder. Nothing but it has run a stranger's program
    until then. Raises `TextError`, and `CheckpointError` for a folder without a tokenizer that
    should have one."""
    if await asyncio.to_thread(has_strange_programs, read_from(folder)):
        reader = BoundedReader(folder, bounds)
        await reader.start()
        return reader
    return TrustedReader(await asyncio.to_thread(load_tokenizer, folder))
