"""Grammars are tried in a bounded process first: keys in turn, what takes long behind what does
not, and each end of it told as what it is."""

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.settings.code_folders import CODE_ROOT
from serving.limits.asker import Asker
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.text.grammar_check import GrammarBounds, GrammarCheck, GrammarsBusyError
from serving.text.grammar_process import ProcessBounds
from tests.serving.endpoint_parts import children_with
from tests.serving.structured.schema_cases import closed
from tests.serving.text.stack_limits import chain
from tests.waiting import wait_in_loop_until

GOOD = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(closed({"a": {"type": "null"}})))
BAD = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(closed({"a": {"not": {}}})))
SHORT = GrammarBounds(attempts_s=(0.02, 0.1))


class Client:
    """One key, and the seconds that it was charged."""

    def __init__(self, name: str, *, has_key: bool = True) -> None:
        self.charged_s = 0.0
        self.asker = Asker(name, has_key=has_key, charge=self._charge)

    def _charge(self, seconds: float) -> None:
        self.charged_s += seconds


def small(name: str) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(closed({name: {"type": "null"}})))


def exploding(name: str = "") -> Grammar:
    """Objects of which each has the next one three times, beside a conjunction with it. It takes
    0.25 s of a fast processor until the library itself finds it too large."""
    depth = 20
    definitions: dict[str, object] = {f"n{depth}": {"type": "object", "$comment": name}}
    for number in range(depth):
        inner = {"$ref": f"#/$defs/n{number + 1}"}
        definitions[f"n{number}"] = {"properties": {"a": inner, "b": inner}, "allOf": [inner]}
    schema = {"$defs": definitions, "$ref": "#/$defs/n0"}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def checked(
    checkpoint: Path,
    check: Callable[[GrammarCheck], Awaitable[None]],
    bounds: GrammarBounds | None = None,
) -> None:
    async def run() -> None:
        grammars = GrammarCheck(checkpoint, bounds)
        try:
            await check(grammars)
        finally:
            grammars.close()

    asyncio.run(run())


def test_grammars_are_judged_and_the_verdicts_kept(checkpoint: Path) -> None:
    async def check(grammars: GrammarCheck) -> None:
        for _ in range(2):
            assert (await grammars.require(GOOD)).num_bytes > 0
            with pytest.raises(GrammarError, match="not") as caught:
                await grammars.require(BAD)
            assert caught.value.place == "/properties/a"
        grammars.close()
        await grammars.require(GOOD)  # known without the process
        with pytest.raises(GrammarError, match="not served any more"):
            await grammars.require(Grammar(GrammarKind.REGEX, "a"))

    checked(checkpoint, check)


def test_a_schema_made_to_explode_ends_in_its_bound_and_is_charged(checkpoint: Path) -> None:
    async def check(grammars: GrammarCheck) -> None:
        client, other = Client("a"), Client("b")
        for _ in range(2):
            began_s = time.process_time()
            with pytest.raises(GrammarError, match=r"more than 0\.1 s of processor time"):
                await grammars.require(exploding(), client.asker)
            assert time.process_time() - began_s < 0.2  # this process has not compiled it
        assert 0.06 < client.charged_s < 0.2, "0.12 s in two attempts, of which 0.05 are free"
        await grammars.require(GOOD, other.asker)
        assert other.charged_s == 0

    checked(checkpoint, check, SHORT)


@pytest.mark.more
def test_one_keys_costly_grammars_keep_no_other_key_waiting(checkpoint: Path) -> None:
    async def check(grammars: GrammarCheck) -> None:
        costly, small_ones = Client("a").asker, Client("b").asker
        ended: list[str] = []

        async def ask(grammar: Grammar, asker: Asker) -> str:
            try:
                await grammars.require(grammar, asker)
            except GrammarsBusyError as error:
                assert "2 schemas of this key wait" in str(error)
                return "busy"
            except GrammarError:
                return "refused"
            finally:
                ended.append(asker.name)
            return "good"

        many = [asyncio.create_task(ask(exploding(f"{n}"), costly)) for n in range(8)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(ask(small(f"p{n}"), small_ones)) for n in range(2)]
        assert await asyncio.gather(*few) == ["good"] * 2
        assert ended[-1] == "b" and ended.count("a") <= 5, "they took turns with the first attempts"
        outcomes = await asyncio.gather(*many)
        # One is tried, and two wait, in the line behind the first attempts; one more for each that
        # is done with there while the first attempts last
        num_refused, num_busy = outcomes.count("refused"), outcomes.count("busy")
        assert num_refused >= 3 and num_busy >= 1 and num_refused + num_busy == 8

    checked(checkpoint, check, GrammarBounds(attempts_s=(0.03, 0.5)))


def test_without_keys_what_is_quick_is_never_refused(checkpoint: Path) -> None:
    async def check(grammars: GrammarCheck) -> None:
        askers = [Client(f"127.0.0.1:{port}", has_key=False).asker for port in range(6)]
        asked = [grammars.require(exploding(f"{n}"), asker) for n, asker in enumerate(askers)]
        tasks = [asyncio.ensure_future(one) for one in asked]
        for name in ("x", "y"):
            await grammars.require(small(name), Client(name, has_key=False).asker)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        busy = [result for result in results if isinstance(result, GrammarsBusyError)]
        assert 0 < len(busy) < 6 and "of this key" not in str(busy[0])

    bounds = GrammarBounds(attempts_s=(0.03, 0.1), max_waiting_without_key=2)
    checked(checkpoint, check, bounds)


def test_a_client_that_leaves_holds_up_nobody(checkpoint: Path) -> None:
    async def check(grammars: GrammarCheck) -> None:
        gone, stays = Client("a"), Client("b")
        await grammars.require(GOOD)  # the process has started
        costly = [
            asyncio.create_task(grammars.require(exploding(f"{n}"), gone.asker)) for n in range(3)
        ]
        shared = asyncio.create_task(grammars.require(exploding("2"), stays.asker))
        await wait_in_loop_until(lambda: gone.charged_s > 0 or len(children_with("run_check")) > 1)
        for task in costly:
            task.cancel()
        assert all(
            isinstance(one, asyncio.CancelledError)
            for one in await asyncio.gather(*costly, return_exceptions=True)
        )
        with pytest.raises(GrammarError, match=r"more than 0\.1 s"):
            await grammars.require(exploding("others"), stays.asker)
        with pytest.raises(GrammarError, match=r"more than 0\.1 s"):
            await shared  # which somebody else wanted too
        assert stays.charged_s < 1.5, "what nobody waited for was ended at once"

    checked(checkpoint, check, GrammarBounds(attempts_s=(0.1,)))


def test_numbers_of_many_remainders_are_refused_before_anything_is_asked(checkpoint: Path) -> None:
    async def check(grammars: GrammarCheck) -> None:
        text = json.dumps(closed({"a": {"type": "integer", "multipleOf": 999983}}))
        with pytest.raises(GrammarError, match="multiples of 999983 take too long") as caught:
            await grammars.require(Grammar(GrammarKind.JSON_SCHEMA, text))
        assert caught.value.place == "/properties/a"
        assert not children_with("run_check"), "no process was started"

    checked(checkpoint, check)


def test_what_crashes_the_process_or_takes_its_memory_is_told_as_that(checkpoint: Path) -> None:
    async def crash(grammars: GrammarCheck) -> None:
        with pytest.raises(GrammarError, match=r"it crashed what compiles it \(SIGSEGV\)"):
            await grammars.require(chain(400))
        await grammars.require(GOOD)

    async def fill(grammars: GrammarCheck) -> None:
        with pytest.raises(GrammarError, match="memory"):
            await grammars.require(exploding())
        await grammars.require(GOOD)

    few_bytes = replace(ProcessBounds(), stack_bytes=1 << 20)
    checked(checkpoint, crash, GrammarBounds(process=few_bytes))
    less = replace(ProcessBounds(), grammar_bytes=8 << 20)
    checked(checkpoint, fill, GrammarBounds(attempts_s=(30.0,), process=less))


def test_what_passes_is_compiled_by_an_engine_where_stacks_are_unlimited(checkpoint: Path) -> None:
    """Where threads have 2 MiB of stack by default, and the first one as much as it wants."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard != resource.RLIM_INFINITY:
        pytest.skip("the limit of stacks cannot be raised here")
    code = (
        "import os, resource, sys; unlimited = resource.RLIM_INFINITY;"
        "resource.setrlimit(resource.RLIMIT_STACK, (unlimited, unlimited));"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, "-m", "tests.serving.text.stack_limits", str(checkpoint)]
    subprocess.run(command, check=True, cwd=CODE_ROOT)
