"""Compiles the grammars of an engine in a thread beside its steps, and keeps those that were used
last."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from serving.structured.compiling import compiled
from serving.structured.grammar import Grammar
from serving.structured.vocabulary import Vocabulary

MAX_GRAMMARS = 128
MAX_BYTES = 4 << 20  # of their texts; compiled they take some times as much


class GrammarCache:
    """The latest grammars, each compiled once. One that is dropped stays with the sequences that
    have it."""

    def __init__(
        self,
        load: Callable[[], Vocabulary],
        *,
        max_grammars: int = MAX_GRAMMARS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """`load` makes the vocabulary, once, with the first grammar."""
        self._load = load
        self._max_grammars, self._max_bytes = max_grammars, max_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._known: OrderedDict[Grammar, Future[Any]] = OrderedDict()
        self._num_bytes = 0
        self._vocabulary: Vocabulary | None = None

    def __len__(self) -> int:
        return len(self._known)

    def get(self, grammar: Grammar) -> Future[Any]:
        """Returns the compiled grammar once the thread has it, or its `GrammarError`."""
        if (known := self._known.get(grammar)) is not None:
            self._known.move_to_end(grammar)
            return known
        future = self._thread.submit(self._compiled, grammar)
        self._known[grammar] = future
        self._num_bytes += len(grammar.text)
        while len(self._known) > 1 and self._is_full():
            dropped, _ = self._known.popitem(last=False)
            self._num_bytes -= len(dropped.text)
        return future

    def _is_full(self) -> bool:
        return len(self._known) > self._max_grammars or self._num_bytes > self._max_bytes

    def _compiled(self, grammar: Grammar) -> Any:
        if self._vocabulary is None:
            self._vocabulary = self._load()
        return compiled(grammar, self._vocabulary)
