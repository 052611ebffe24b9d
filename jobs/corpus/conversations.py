"""Reads the messages of a line in the forms in which conversations are stored.

The forms are those that TRL's trainers take: `messages` as OpenAI's API has them, `conversations`
as ShareGPT wrote them, and a `prompt` with its `completion`, each a text or a list of messages.
"""

from typing import Any

Message = dict[str, str]  # role and content

_MESSAGE = ("role", "content")
_SHAREGPT = ("from", "value")
_ROLES_OF_SHAREGPT = {"human": "user", "gpt": "assistant"}

FORMS = "`messages`, `conversations`, or `prompt` with `completion`"
"""The fields of a line that has messages, in words."""


def messages_of(line: Any) -> list[Message]:
    """Returns the messages of a line's JSON value, and none where it has no such form. Of a line
    with `messages` no other form is looked for. What a message has beside its role and its text is
    not read."""
    if not isinstance(line, dict):
        return []
    if "messages" in line:
        return _listed(line["messages"])
    if "conversations" in line:
        return _system(line.get("system")) + _listed(line["conversations"])
    if "prompt" in line and "completion" in line:
        return _pair(line["prompt"], line["completion"])
    return []


def text_of_content(content: Any) -> Any:
    """Returns a message's content with the text of its parts joined, as OpenAI's format has them,
    and any other content as it is: an image has no text."""
    parts = content if isinstance(content, list) and content else None
    if parts is None or not all(
        isinstance(part, dict) and part.get("type") == "text" for part in parts
    ):
        return content
    texts = [part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _listed(turns: Any) -> list[Message]:
    """Returns the messages of a list, and none if one of them has no role or no text."""
    if not isinstance(turns, list):
        return []
    messages = [_message(turn) for turn in turns]
    whole = [message for message in messages if message is not None]
    return whole if len(whole) == len(messages) else []


def _message(turn: Any) -> Message | None:
    if not isinstance(turn, dict):
        return None
    is_sharegpt = "from" in turn and "role" not in turn
    role, content = (turn.get(name) for name in (_SHAREGPT if is_sharegpt else _MESSAGE))
    text = text_of_content(content)
    if not isinstance(role, str) or not isinstance(text, str):
        return None
    return {"role": _ROLES_OF_SHAREGPT.get(role, role) if is_sharegpt else role, "content": text}


def _system(text: Any) -> list[Message]:
    """Returns what some files of ShareGPT's form have beside the conversation."""
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _pair(prompt: Any, completion: Any) -> list[Message]:
    """Returns a prompt as the user's turn and its completion as the assistant's answer."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    asked, answered = _listed(prompt), _listed(completion)
    return asked + answered if asked and answered else []
