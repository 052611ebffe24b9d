"""The bounded process that runs a checkpoint's chat template and tokenizer: each line is a request
and gets a line.

It first sends two lines of its own: once it has read the tokenizer, and once it has written the
probes.

The kernel ends it at its bounds of processor time and memory, whatever holds Python's lock
meanwhile.
"""

import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.files.bounded_text import Bounds
from model.files.line_server import LineServer, own_arguments
from model.files.stored_tokenizer import load_tokenizer
from model.text.chat import Chat, ChatError
from model.text.chat_probe import probe_of
from model.text.tokenizer import PromptEncoding, Tokenizer
from raymill.errors import UserError


def allow(cpu_s: float) -> None:
    """Ends this process once it has used so much more processor time, also in the middle of one C
    function."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def as_line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


def answer_to(request: dict[str, Any], tokenizer: Tokenizer, chat: Chat) -> dict[str, Any]:
    try:
        if "messages" in request:
            return {"ids": chat.prompt_ids(**request)}
        how = PromptEncoding(**request["how"])
        return {
            "ids": [
                tokenizer.encode_prompt(text, how) or [tokenizer.eot_id]
                for text in request["texts"]
            ]
        }
    except ChatError as error:
        return {"error": str(error)}
    except UserError as error:
        return {"error": f"the tokenizer refuses the text: {error}"}
    except MemoryError:
        return {"error": "the text takes more memory than a chat template or tokenizer may have"}


def main() -> int:
    args = own_arguments()  # see `process_arguments` of bounded_text.py
    bounds = Bounds(**args["bounds"])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would take the engine's processors
    # No dump of a client's text
    limits = {resource.RLIMIT_AS: bounds.memory_bytes, resource.RLIMIT_CORE: 0}
    server = LineServer(args["socket"], limits=limits)
    allow(bounds.load_cpu_s)
    try:
        tokenizer = load_tokenizer(Path(args["folder"]))
        assert tokenizer is not None, "a folder without a tokenizer has no programs"
        tokenizer.encode_whole("a text")  # once, so that the first request finds its tables ready
        chat = Chat(tokenizer)
        server.send(as_line({"loaded": True}))
        allow(bounds.request_cpu_s)
        probe = probe_of(chat, is_chat_tuned=tokenizer.chat is not None)
    except (
        UserError,
        ValueError,
        KeyError,
        TypeError,
        MemoryError,
    ) as error:  # foreign files may raise anything
        what = f"the tokenizer or chat template cannot be read: {str(error) or repr(error)}"
        server.send(as_line({"error": what}))
        return 1
    server.send(as_line({"probe": asdict(probe)}))

    def answer(line: bytes) -> bytes:
        allow(bounds.request_cpu_s)
        return as_line(answer_to(json.loads(line), tokenizer, chat))

    server.serve(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
