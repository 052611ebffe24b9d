"""The way in which a tokenizer's conversations are written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatFormat:
    """The format in tokenizer_config.json; `model.text.chat` writes it."""

    chat_template: str  # in Jinja
    bos_token: str  # as the template gets it, like the next one
    eos_token: str
