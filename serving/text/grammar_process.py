"""The process that tries to compile clients' grammars, as its replica sees it: several questions at
a time, each within bounds."""

import asyncio
import itertools
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from serving.engine_process.child_process import Child, kill_child, start_child
from serving.structured.grammar import STACK_BYTES, Grammar, GrammarError
from serving.text.bounded_process import ExceededError, next_line

MODULE = "serving.structured.run_check"
WALL_FACTOR = 20.0  # times the processor time: for a process that waits for a processor
LEAST_WALL_S = 40.0


@dataclass(frozen=True)
class ProcessBounds:
    """Bounds of the process."""

    load_cpu_s: float = 60.0  # processor time in which it reads the tokenizer
    load_bytes: int = 2 << 30  # of address space with it
    grammar_bytes: int = 256 << 20  # more, for each grammar
    stack_bytes: int = STACK_BYTES // 2  # on which it is compiled; an engine has twice as much


@dataclass(frozen=True)
class GrammarOutcome:
    """The outcome of a question: a verdict, or how its process ended."""

    cpu_s: float = 0.0
    verdict: dict[str, Any] | None = None
    signal: int | None = None
    exit_code: int | None = None

    @property
    def is_exceeded(self) -> bool:
        """Whether it needs more processor time than it was given."""
        return self.signal == signal.SIGPROF


@dataclass(eq=False)
class GrammarQuestion:
    """A grammar, and what its processor time is charged to."""

    grammar: Grammar
    charge: Callable[[float], None]
    cpu_s: float = field(default=0.0, init=False)

    def spend(self, cpu_s: float, *, free_s: float) -> None:
        """Charges what it has taken, beyond what is free in all."""
        before_s = max(0.0, self.cpu_s - free_s)
        self.cpu_s += cpu_s
        if (more_s := max(0.0, self.cpu_s - free_s) - before_s) > 0:
            self.charge(more_s)


@dataclass(frozen=True)
class _Open:
    """A question that is under way, also after its client has left."""

    outcome: "asyncio.Future[GrammarOutcome]"
    on_end: Callable[[float], None]


class GrammarProcess:
    """Starts with the first question, and anew after it has ended."""

    def __init__(
        self, folder: Path, bounds: ProcessBounds, *, python: str = sys.executable
    ) -> None:
        self._folder, self._bounds, self._python = folder, bounds, python
        self._child: Child | None = None
        self._listening: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._open: dict[int, _Open] = {}
        self._numbers = itertools.count()
        self._is_closed = False
        self._refusal = ""  # of every grammar, by this model or endpoint

    async def ask(
        self,
        grammar: Grammar,
        *,
        cpu_s: float,
        niceness: int,
        on_end: Callable[[float], None],
    ) -> GrammarOutcome:
        """Returns what has become of a grammar within so much processor time, for which what is
        less nice comes first. Calls `on_end` with
        what it has taken, also where nobody waits for it any more. Raises `GrammarError` if no
        grammar can be read."""
        child = await self._started()
        number = next(self._numbers)
        outcome = asyncio.get_running_loop().create_future()
        self._open[number] = _Open(outcome, on_end)
        asked = {**asdict(grammar), "number": number, "cpu_s": cpu_s, "niceness": niceness}
        child.writer.write(orjson.dumps(asked) + b"\n")
        try:
            async with asyncio.timeout(max(LEAST_WALL_S, WALL_FACTOR * cpu_s)):
                return await outcome
        except TimeoutError:
            return GrammarOutcome(signal=signal.SIGPROF)
        finally:
            if not outcome.done() or outcome.cancelled():
                child.writer.write(orjson.dumps({"end": number}) + b"\n")

    def close(self) -> None:
        self._is_closed = True
        if self._listening is not None:
            self._listening.cancel()
        self._end()

    async def _started(self) -> Child:
        async with self._starting:
            if self._is_closed:
                raise GrammarError("this version is not served any more")
            if self._refusal:
                raise GrammarError(self._refusal)
            if self._child is None:
                child = self._child = await self._begin()
                self._listening = asyncio.create_task(self._listen(child))
            return self._child

    async def _begin(self) -> Child:
        """Raises `GrammarError` if the process cannot read the tokenizer, or lacks its library."""
        bounds = self._bounds
        arguments = {"folder": str(self._folder.absolute()), "threads": 1, **asdict(bounds)}
        child = await start_child(MODULE, arguments, python=self._python)
        try:
            first = await next_line(child, within_s=WALL_FACTOR * bounds.load_cpu_s)
        except ExceededError:
            raise GrammarError("the tokenizer takes too long or too much memory") from None
        except BaseException:
            kill_child(child)
            raise
        self._refusal = orjson.loads(first).get("error", "")
        if self._refusal:
            kill_child(child)
            raise GrammarError(self._refusal)
        return child

    async def _listen(self, child: Child) -> None:
        """Hands out what the process says, until it ends."""
        while line := await child.reader.readline():
            told = orjson.loads(line)
            asked = self._open.pop(told.pop("number"))
            outcome = GrammarOutcome(**told)
            asked.on_end(outcome.cpu_s)
            if not asked.outcome.done():
                asked.outcome.set_result(outcome)
        self._end()

    def _end(self) -> None:
        if self._child is None:
            return
        kill_child(self._child)
        ended = GrammarOutcome(exit_code=self._child.process.returncode)
        self._child = None
        for asked in self._open.values():
            if not asked.outcome.done():
                asked.outcome.set_result(ended)
        self._open.clear()
