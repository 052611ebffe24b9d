"""Has a bounded process try whether an answer can follow a grammar, before an engine gets it: keys
in turn, and what takes long behind what does not."""

import asyncio
import itertools
import json
import re
import signal
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serving.engine_process.fair_queue import FairLine
from serving.limits.asker import NOBODY, Asker
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.multiples import require_cheap_multiples
from serving.text.grammar_process import (
    GrammarOutcome,
    GrammarProcess,
    GrammarQuestion,
    ProcessBounds,
)

MAX_VERDICTS, MAX_VERDICT_BYTES = 1024, 8 << 20  # that are kept, with their grammars' text
LATER_NICENESS = 5  # of attempts after the first: engines and first attempts come before them
QUICK_BYTES = 16 << 10  # of a schema whose words promise that it is read at once
_COSTLY = re.compile(
    r'"(allOf|oneOf|not|pattern|patternProperties|format|multipleOf|m(in|ax)Length)"'
)
FREE_CPU_S = 0.05  # of processor time for a grammar; more is charged to its asker


class GrammarsBusyError(Exception):
    """The asker has too many grammars waiting that take long to compile."""


@dataclass(frozen=True)
class GrammarBounds:
    """Bounds on the time of grammars, and on how many may wait."""

    # Processor time of each attempt. What is not done then waits in the next line, since a grammar
    # of 5,000 words takes 15 ms and most take 1
    attempts_s: tuple[float, ...] = (0.02, 0.2, 2.0)
    max_waiting: int = 2  # of one key, behind the first attempt
    max_waiting_without_key: int = 16  # of all askers without one
    process: ProcessBounds = field(default_factory=ProcessBounds)


@dataclass(eq=False)
class _Asked:
    """A grammar that is being tried, for all who have asked for it meanwhile."""

    verdict: "asyncio.Task[dict[str, Any]]"
    asker: Asker
    num_clients: int = 0


class GrammarCheck:
    """The grammars of one version's clients, which a process compiles. What it says is kept."""

    def __init__(
        self, folder: Path, bounds: GrammarBounds | None = None, *, python: str = sys.executable
    ) -> None:
        """`python` is the engine's, whose `llguidance` may be another release than ours."""
        self._bounds = bounds or GrammarBounds()
        self._process = GrammarProcess(folder, self._bounds.process, python=python)
        self._lines = [_Line() for _ in self._bounds.attempts_s]
        self._quick = _Line()  # beside the first line, for what should take less
        self._num_waiting: Counter[str] = Counter()  # of each key, behind the first line
        self._asked: dict[Grammar, _Asked] = {}
        self._verdicts: OrderedDict[Grammar, dict[str, Any]] = OrderedDict()
        self._num_bytes = 0

    async def require(self, grammar: Grammar, asker: Asker = NOBODY) -> Grammar:
        """Returns a grammar with what it takes. Raises `GrammarError` unless an answer can follow
        it, and `GrammarsBusyError`."""
        while grammar not in self._verdicts:
            _require_cheap(grammar)
            asked = self._asked.get(grammar)
            if asked is None:
                task = asyncio.create_task(self._judge(grammar, asker))
                asked = self._asked[grammar] = _Asked(task, asker)
            try:
                await self._heard(grammar, asked)
            except GrammarsBusyError:
                if asked.asker.name == asker.name:
                    raise  # and else it asks for itself
        self._verdicts.move_to_end(grammar)
        verdict = self._verdicts[grammar]
        if "error" in verdict:
            raise GrammarError(verdict["error"], place=verdict["place"])
        return replace(grammar, num_bytes=verdict["num_bytes"])

    def close(self) -> None:
        self._process.close()

    async def _heard(self, grammar: Grammar, asked: _Asked) -> None:
        """Returns with the verdict. Once all who wait for it have left, it is not asked for."""
        asked.num_clients += 1
        try:
            await asyncio.shield(asked.verdict)
        finally:
            asked.num_clients -= 1
            if asked.num_clients == 0 and not asked.verdict.done():
                self._forget(grammar, asked.verdict)
                asked.verdict.cancel()

    def _forget(self, grammar: Grammar, verdict: "asyncio.Task[dict[str, Any]] | None") -> None:
        """Forgets a question, unless it is another one's by now."""
        if grammar in self._asked and self._asked[grammar].verdict is verdict:
            del self._asked[grammar]

    async def _judge(self, grammar: Grammar, asker: Asker) -> dict[str, Any]:
        """Keeps and returns what becomes of a grammar."""
        question = GrammarQuestion(grammar, asker.charge)
        try:
            first = self._quick if _looks_quick(grammar) else self._lines[0]
            lines = [first, *self._lines[1:]]
            for cpu_s, line in zip(self._bounds.attempts_s, lines, strict=True):
                outcome = await self._attempt(question, asker, line=line, cpu_s=cpu_s)
                if not outcome.is_exceeded:
                    break
            verdict = outcome.verdict or {"error": self._told(outcome), "place": ""}
            self._keep(grammar, verdict)
            return verdict
        finally:
            self._forget(grammar, asyncio.current_task())

    async def _attempt(
        self, question: GrammarQuestion, asker: Asker, *, line: "_Line", cpu_s: float
    ) -> GrammarOutcome:
        """Waits for the asker's turn, and tries. Raises `GrammarsBusyError`."""
        place = asker.name if asker.has_key else ""
        is_first = line in (self._quick, self._lines[0])
        if not is_first:
            self._require_few(place, asker)
            self._num_waiting[place] += 1
        expected_ms = round(1000 * cpu_s)
        try:
            await line.enter(asker.name, cost=expected_ms)
        finally:
            if not is_first:
                self._num_waiting[place] -= 1

        def pay(taken_s: float) -> None:
            question.spend(taken_s, free_s=FREE_CPU_S)
            taken_ms = round(1000 * taken_s)
            for one in {self._quick, self._lines[0], line}:
                one.charge(asker.name, taken_ms - (expected_ms if one is line else 0))

        try:
            niceness = 0 if is_first else LATER_NICENESS
            return await self._process.ask(
                question.grammar, cpu_s=cpu_s, niceness=niceness, on_end=pay
            )
        finally:
            line.leave()

    def _require_few(self, place: str, asker: Asker) -> None:
        bounds = self._bounds
        most = bounds.max_waiting if asker.has_key else bounds.max_waiting_without_key
        if self._num_waiting[place] >= most:
            whose = "of this key " if asker.has_key else ""
            raise GrammarsBusyError(
                f"{most} schemas {whose}wait that take long to compile; try again later"
            )

    def _told(self, outcome: GrammarOutcome) -> str:
        """Returns why there is no verdict."""
        process = self._bounds.process
        if outcome.is_exceeded:
            return f"it takes more than {self._bounds.attempts_s[-1]:g} s of processor time to compile: make it simpler"
        if outcome.signal == signal.SIGABRT:
            return f"it takes more than {process.grammar_bytes >> 20} MiB of memory to compile: make it simpler"
        if outcome.signal is not None:
            name = signal.Signals(outcome.signal).name
            return f"it crashed what compiles it ({name}), as one does that is nested too deeply: make it simpler"
        return f"what compiles it has ended (exit code {outcome.exit_code}); if that happens again, make it simpler"

    def _keep(self, grammar: Grammar, verdict: dict[str, Any]) -> None:
        self._verdicts[grammar] = verdict
        self._num_bytes += len(grammar.text)
        while len(self._verdicts) > 1 and (
            len(self._verdicts) > MAX_VERDICTS or self._num_bytes > MAX_VERDICT_BYTES
        ):
            dropped, _ = self._verdicts.popitem(last=False)
            self._num_bytes -= len(dropped.text)


class _Line:
    """The queue for the checker: one at a time, and keys in turn, by the milliseconds
    of processor time that they have taken."""

    def __init__(self) -> None:
        self._waiting: FairLine[asyncio.Future[None]] = FairLine()
        self._numbers = itertools.count()
        self._is_taken = False

    async def enter(self, key: str, *, cost: int) -> None:
        """Returns with the turn, which `leave` ends."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        self._waiting.hold(turn, key=key, number=number, cost=cost)
        self._take()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove(number)
            else:  # it has come meanwhile
                self.leave()
            raise

    def charge(self, key: str, cost: int) -> None:
        self._waiting.charge(key, cost)

    def leave(self) -> None:
        self._is_taken = False
        self._take()

    def _take(self) -> None:
        while not self._is_taken and len(self._waiting) > 0:
            turn = self._waiting.take()
            if not turn.cancelled():
                self._is_taken = True
                turn.set_result(None)


def _looks_quick(grammar: Grammar) -> bool:
    is_short = grammar.kind is GrammarKind.JSON_SCHEMA and len(grammar.text) <= QUICK_BYTES
    return is_short and _COSTLY.search(grammar.text) is None


def _require_cheap(grammar: Grammar) -> None:
    """Raises `GrammarError` for what is known to take too long."""
    if grammar.kind is GrammarKind.JSON_SCHEMA and '"multipleOf"' in grammar.text:
        require_cheap_multiples(json.loads(grammar.text))
