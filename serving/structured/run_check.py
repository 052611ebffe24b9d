"""The bounded process that compiles clients' grammars first: each line is a question and gets a
line.

It first sends a line of its own, once it has read the tokenizer. Each grammar is compiled in a
copy of this process, which the kernel ends at its bounds of processor time, memory and stack. So
no grammar holds up an engine, and none costs the time to read a tokenizer again.
"""

import ctypes
import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from raymill.errors import UserError
from serving.structured.compiling import compiled
from serving.structured.grammar import ANY_JSON_OBJECT, Grammar, GrammarError, GrammarKind
from serving.structured.grammar_memory import heap_bytes
from serving.structured.token_mask import TokenMask
from serving.structured.vocabulary import Vocabulary, vocabulary_of

MAX_GRAMMAR_BYTES = 32 << 20  # that stay taken for a grammar
RECEIVE_BYTES = 1 << 16
_END_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class CheckingCopy:
    """A process that compiles one grammar, and the question that it answers."""

    pid: int
    number: int
    answer: int  # our end of its pipe


def answer_to(grammar: Grammar, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the bytes of a grammar that an answer can follow, or else what is wrong with it."""
    before = heap_bytes() or 0
    try:
        made = compiled(grammar, vocabulary)
    except GrammarError as error:
        return {"error": error.message, "place": error.place}
    except MemoryError:
        return {"error": "it takes more memory than a grammar may have", "place": ""}
    vocab_size = vocabulary.tree.vocab_size
    mask = TokenMask(made, stop_ids=[vocabulary.eos_id], vocab_size=vocab_size)
    allowed = mask.allowed()
    num_bytes = max(0, (heap_bytes() or 0) - before)
    if num_bytes > MAX_GRAMMAR_BYTES:
        return {"error": f"it takes more than {MAX_GRAMMAR_BYTES >> 20} MiB of memory", "place": ""}
    if allowed is None:
        why = "is too costly to follow" if mask.problem else "can begin with no token of the model"
        return {"error": f"an answer by it {why}", "place": ""}
    return {"num_bytes": num_bytes}


class Checker:
    """Answers the questions of a replica."""

    def __init__(
        self,
        connection: socket.socket,
        vocabulary: Vocabulary,
        *,
        memory_bytes: int,
        stack_bytes: int,
    ) -> None:
        """A copy may take so much more memory than this process, and has such a stack."""
        self._connection = connection
        self._vocabulary = vocabulary
        self._memory_bytes = memory_bytes + stack_bytes
        self._stack_bytes = stack_bytes
        self._copies: dict[int, CheckingCopy] = {}  # by question
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ, self._read)
        self._rest = b""  # of a line that has not arrived whole

    def run(self) -> None:
        """Returns once the replica is gone. Copies end with this process."""
        try:
            while True:
                for key, _ in self._selector.select():
                    key.data()
        except (EOFError, ConnectionError):
            return

    def _read(self) -> None:
        data = self._connection.recv(RECEIVE_BYTES)
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if "end" not in asked:
                self._start(asked)
            elif asked["end"] in self._copies:
                os.kill(self._copies[asked["end"]].pid, signal.SIGKILL)

    def _start(self, asked: dict[str, Any]) -> None:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            self._connection.close()
            self._answer(asked, theirs)
        os.close(theirs)
        copy = CheckingCopy(pid, asked["number"], ours)
        self._copies[copy.number] = copy
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._finish(copy))

    def _answer(self, asked: dict[str, Any], to: int) -> NoReturn:
        """Is all that a copy does."""
        os.nice(asked["niceness"])
        signal.setitimer(signal.ITIMER_PROF, asked["cpu_s"])  # whose signal ends it
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
            bound_memory(self._memory_bytes)
        kind, text, lenient = GrammarKind(asked["kind"]), asked["text"], asked["lenient"]
        grammar = Grammar(kind, text, lenient)
        answer: dict[str, Any] = {}
        with_stack(self._stack_bytes, lambda: answer.update(answer_to(grammar, self._vocabulary)))
        os.write(to, json.dumps(answer).encode())  # fewer bytes than a pipe holds
        os._exit(0 if answer else 1)

    def _finish(self, copy: CheckingCopy) -> None:
        """Sends what a copy has answered, or what ended it."""
        answer = os.read(copy.answer, RECEIVE_BYTES)
        self._selector.unregister(copy.answer)
        os.close(copy.answer)
        _, status, usage = os.wait4(copy.pid, 0)
        del self._copies[copy.number]
        told: dict[str, Any] = {"number": copy.number, "cpu_s": usage.ru_utime + usage.ru_stime}
        if os.WIFSIGNALED(status):
            told["signal"] = os.WTERMSIG(status)
        elif answer and os.WEXITSTATUS(status) == 0:
            told["verdict"] = json.loads(answer)
        else:
            told["exit_code"] = os.WEXITSTATUS(status)
        send(self._connection, told)


def with_stack(num_bytes: int, work: Callable[[], Any]) -> None:
    """Does some work on a stack of that size, beyond this process's own limit if need be."""
    threading.stack_size(num_bytes)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def bound_memory(num_bytes: int) -> None:
    """Lets this process take so much more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def send(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer, separators=(",", ":")).encode() + b"\n")


def main() -> int:
    args = json.loads(sys.argv[1])  # see `GrammarProcess`
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would take the engine's processors
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no dump of a client's text
    connection = socket.socket(fileno=args["socket"])
    signal.setitimer(signal.ITIMER_PROF, args["load_cpu_s"])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (args["load_bytes"], hard))
    try:
        vocabulary = vocabulary_of(Path(args["folder"]))
    except (UserError, GrammarError) as error:
        send(connection, {"error": str(error)})
        return 1
    answer_to(Grammar(GrammarKind.JSON_SCHEMA, ANY_JSON_OBJECT), vocabulary)  # no copy warms up
    gc.freeze()
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(connection, {})
    sizes = {"memory_bytes": args["grammar_bytes"], "stack_bytes": args["stack_bytes"]}
    Checker(connection, vocabulary, **sizes).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
