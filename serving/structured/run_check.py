"""The bounded process that compiles a client's grammar first: each line is a grammar and gets a
line.

It first sends a line of its own, once it has read the tokenizer. The kernel ends it at its bounds
of processor time and memory, so that no grammar can hold up an engine.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from model.errors import UserError
from serving.structured.compiling import compiled
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.token_mask import TokenMask
from serving.structured.vocabulary import Vocabulary, vocabulary_of


def allow(cpu_s: float) -> None:
    """Ends this process once it has used so much more processor time."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def answer_to(request: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns nothing for a grammar that an answer can follow, or else what is wrong with it."""
    grammar = Grammar(GrammarKind(request["kind"]), request["text"], request["lenient"])
    try:
        matcher = compiled(grammar, vocabulary)
    except GrammarError as error:
        return {"error": error.message, "place": error.place}
    except MemoryError:
        return {"error": "it takes more memory than a grammar may have", "place": ""}
    mask = TokenMask(matcher, stop_ids=[vocabulary.eos_id], vocab_size=vocabulary.tree.vocab_size)
    if mask.allowed() is None:
        return {"error": "no token of the model can begin an answer that follows it", "place": ""}
    return {}


def main() -> int:
    args = json.loads(sys.argv[1])  # see `GrammarCheck`
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would take the engine's processors
    resource.setrlimit(resource.RLIMIT_AS, (args["memory_bytes"], args["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no dump of a client's text
    connection = socket.socket(fileno=args["socket"])

    def send(answer: dict[str, Any]) -> None:
        connection.sendall(json.dumps(answer, separators=(",", ":")).encode() + b"\n")

    allow(args["load_cpu_s"])
    try:
        vocabulary = vocabulary_of(Path(args["folder"]))
    except (UserError, GrammarError) as error:
        send({"error": str(error)})
        return 1
    send({})
    with contextlib.suppress(ConnectionError), connection.makefile("rb") as lines:
        for line in lines:
            allow(args["grammar_cpu_s"])
            send(answer_to(json.loads(line), vocabulary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
