"""Asks a bounded process whether an answer can follow a grammar, before an engine gets it."""

import asyncio
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from serving.engine_process.child_process import Child, kill_child, start_child
from serving.structured.grammar import Grammar, GrammarError
from serving.text.bounded_process import BoundedProcess, ClosedError, ExceededError, next_line

MODULE = "serving.structured.run_check"
MAX_VERDICTS, MAX_VERDICT_BYTES = 1024, 8 << 20  # that are kept, with their grammars' text
WALL_FACTOR = 20.0  # times the processor time: for a process that waits for a processor


class GrammarsBusyError(Exception):
    """Too many grammars wait to be compiled."""


@dataclass(frozen=True)
class GrammarBounds:
    """What the process may use, and how many may wait for it."""

    load_cpu_s: float = 60.0  # processor time in which it reads the tokenizer
    grammar_cpu_s: float = 2.0  # for each grammar; one of 5,000 words takes 15 ms
    memory_bytes: int = 2 << 30  # of address space
    max_waiting: int = 64


class GrammarCheck:
    """The grammars of one version's clients, which a bounded process compiles. What it says is
    kept."""

    def __init__(
        self, folder: Path, bounds: GrammarBounds | None = None, *, python: str = sys.executable
    ) -> None:
        """`python` is the engine's, whose `llguidance` may be another release than ours."""
        self._folder, self._bounds = folder, bounds or GrammarBounds()
        self._python = python
        self._process = BoundedProcess(self._begin)
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._verdicts: OrderedDict[Grammar, dict[str, Any]] = OrderedDict()
        self._num_bytes = 0
        self._refusal = ""  # of every grammar, by this model or endpoint

    async def require(self, grammar: Grammar) -> None:
        """Raises `GrammarError` unless an answer can follow it, and `GrammarsBusyError`."""
        if grammar not in self._verdicts:
            if self._num_waiting >= self._bounds.max_waiting:
                raise GrammarsBusyError
            self._num_waiting += 1
            try:
                async with self._turn:
                    if grammar not in self._verdicts:  # another request had the same
                        self._keep(grammar, await self._ask(grammar))
            finally:
                self._num_waiting -= 1
        self._verdicts.move_to_end(grammar)
        verdict = self._verdicts[grammar]
        if "error" in verdict:
            raise GrammarError(verdict["error"], place=verdict["place"])

    def close(self) -> None:
        self._process.close()

    def _keep(self, grammar: Grammar, verdict: dict[str, Any]) -> None:
        self._verdicts[grammar] = verdict
        self._num_bytes += len(grammar.text)
        while len(self._verdicts) > 1 and (
            len(self._verdicts) > MAX_VERDICTS or self._num_bytes > MAX_VERDICT_BYTES
        ):
            dropped, _ = self._verdicts.popitem(last=False)
            self._num_bytes -= len(dropped.text)

    async def _ask(self, grammar: Grammar) -> dict[str, Any]:
        """Returns what the process says of a grammar. Raises `GrammarError` where it can read
        none."""
        bounds = self._bounds
        try:
            line = orjson.dumps(asdict(grammar))
            answer = await self._process.ask(line, within_s=WALL_FACTOR * bounds.grammar_cpu_s)
        except ClosedError:
            raise GrammarError("this version is not served any more") from None
        except ExceededError:
            exceeded = (
                f"it takes more than {bounds.grammar_cpu_s:g} s of processor time or "
                f"{bounds.memory_bytes >> 30} GiB of memory to compile: make it simpler"
            )
            return {"error": exceeded, "place": ""}
        verdict: dict[str, Any] = orjson.loads(answer)
        return verdict

    async def _begin(self) -> Child:
        """Raises `GrammarError` if the process cannot read the tokenizer, or lacks its library."""
        if self._refusal:
            raise GrammarError(self._refusal)
        bounds = {
            name: value for name, value in asdict(self._bounds).items() if name != "max_waiting"
        }
        arguments = {"folder": str(self._folder.absolute()), "threads": 1, **bounds}
        child = await start_child(MODULE, arguments, python=self._python)
        try:
            first = await next_line(child, within_s=WALL_FACTOR * self._bounds.load_cpu_s)
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
