"""A chat template's outcome for a few conversations: whether it ends, and how it compares with
another one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from model.text.chat import Chat, ChatError, Message, rendered

_USER = {"role": "user", "content": "question"}
_ASSISTANT = {"role": "assistant", "content": "answer"}
_SYSTEM = {"role": "system", "content": "rules"}
PROBES: dict[str, Sequence[Message]] = {
    "a user's message": (_USER,),
    "a second turn": (_USER, _ASSISTANT, _USER),
    "a system's message": (_SYSTEM, _USER),
    "a second turn after a system's message": (_SYSTEM, _USER, _ASSISTANT, _USER),
}
"""By what they are called in messages. Some templates refuse a system's message."""


@dataclass(frozen=True)
class ChatProbe:
    """The results, which are small enough to send between processes."""

    is_chat_tuned: bool  # whether the template is the checkpoint's own
    hashes: dict[str, str]  # of the text of each conversation that the template writes
    refusals: dict[str, str]  # the template's words, for the others
    end_of_turn: int | None  # the token that ends an answer


def probe_of(chat: Chat, *, is_chat_tuned: bool) -> ChatProbe:
    """Renders all conversations. A template that does not compile refuses all of them."""
    hashes: dict[str, str] = {}
    refusals: dict[str, str] = {}
    for name, messages in PROBES.items():
        try:
            text = rendered(chat.format, messages, asks=True)
        except ChatError as error:
            refusals[name] = str(error)
        else:
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    return ChatProbe(is_chat_tuned, hashes, refusals, chat.end_of_turn)
