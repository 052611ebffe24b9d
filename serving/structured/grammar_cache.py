"""Compiles the grammars of an engine in a thread beside its steps, and keeps the last used ones."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from serving.structured.compiled_grammar import CompiledGrammar
from serving.structured.compiling import compiled
from serving.structured.grammar import STACK_BYTES, Grammar
from serving.structured.grammar_memory import MOST_BYTES, GrammarMemory
from serving.structured.vocabulary import Vocabulary

MAX_GRAMMARS = 128
KEPT_SHARE = 2  # of the memory, the half is for those that are kept; the rest for answers
MAX_GROWN_BYTES = 8 << 20  # by what answers have taught it, after which a grammar is compiled anew
LEAST_BYTES = 64 << 10  # of a compiled grammar
BYTES_FOR_EACH = 64  # byte of its text; of 5,000 words 38


class GrammarCache:
    """The latest grammars, each compiled once. One that is dropped stays with the sequences that
    have it."""

    def __init__(
        self,
        load: Callable[[], Vocabulary],
        *,
        max_grammars: int = MAX_GRAMMARS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """`load` makes the vocabulary, once, with the first grammar. All grammars together take
        `most_bytes`, as far as their memory is known."""
        self._load = load
        self._max_grammars = max_grammars
        self.memory = GrammarMemory(most_bytes, make_room=self._drop_half)
        self._thread = _thread_with_stack(STACK_BYTES)
        self._known: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._vocabulary: Vocabulary | None = None

    def __len__(self) -> int:
        return len(self._known)

    def get(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Returns the compiled grammar once the thread has it, or its `GrammarError`."""
        if (known := self._known.get(grammar)) is not None and not _is_worn(known):
            self._known.move_to_end(grammar)
            return known
        future = self._thread.submit(self._compiled, grammar)
        self._known[grammar] = future
        self._known.move_to_end(grammar)
        while len(self._known) > 1 and self._is_full():
            self._known.popitem(last=False)
        return future

    def _is_full(self) -> bool:
        num_bytes = sum(
            _least_bytes(grammar) if (ready := _ready(known)) is None else ready.num_bytes
            for grammar, known in self._known.items()
        )
        return (
            len(self._known) > self._max_grammars or num_bytes * KEPT_SHARE > self.memory.most_bytes
        )

    def _drop_half(self) -> None:
        for _ in range((len(self._known) + 1) // 2):
            self._known.popitem(last=False)

    def _compiled(self, grammar: Grammar) -> CompiledGrammar:
        if self._vocabulary is None:
            self._vocabulary = self._load()
        made = compiled(grammar, self._vocabulary)
        made.count_in(self.memory, _least_bytes(grammar))
        return made


def _thread_with_stack(num_bytes: int) -> ThreadPoolExecutor:
    """Returns a thread with such a stack, whatever the limits of this process are."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
    before = threading.stack_size(num_bytes)
    try:
        executor.submit(bool)  # starts it
    finally:
        threading.stack_size(before)
    return executor


def _least_bytes(grammar: Grammar) -> int:
    """Returns what a compiled grammar takes: as it was measured, or else as its text has it."""
    return max(grammar.num_bytes, LEAST_BYTES + BYTES_FOR_EACH * len(grammar.text))


def _ready(known: Future[CompiledGrammar]) -> CompiledGrammar | None:
    return known.result() if known.done() and known.exception() is None else None


def _is_worn(known: Future[CompiledGrammar]) -> bool:
    """Whether a grammar has learned so much that the next answer would do better with a new one."""
    ready = _ready(known)
    return ready is not None and (ready.has_exceeded or ready.grown_bytes > MAX_GROWN_BYTES)
