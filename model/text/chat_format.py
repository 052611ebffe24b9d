"""The way in which a tokenizer's conversations are written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatFormat:
    """What tokenizer_config.json says of it; `model.text.chat` does it."""

    chat_template: str  # in Jinja
    bos_token: str  # as the template gets it, like the next one
    eos_token: str
