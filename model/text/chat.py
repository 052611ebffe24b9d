"""Conversations as text and as tokens, by the tokenizer's own chat template or a plain one: for
training and serving.

A template is a program in Jinja, which gets the names that Hugging Face gives it and runs in a
sandbox. It sees no clock, so that the same messages have the same tokens. It alone writes special
tokens: in a message their text is letters.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from model.text.chat_format import ChatFormat
from model.text.places import TextPlace
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError

ROLES = ("system", "developer", "user", "assistant")
"""Roles of a message; a template sees a developer as the system."""

PLAIN_TEMPLATE = """\
{{ bos_token }}{% for message in messages -%}
{{ message.name or {'user': 'User', 'assistant': 'Assistant'}.get(message.role, 'System') }}:
{{ message.content }}{{ eos_token if message.role == 'assistant' }}
{% endfor %}{{ 'Assistant:\\n' if add_generation_prompt }}"""
"""A dialogue, for a tokenizer without a template. A model that was never taught to chat gets it
without tokens."""

OWN_NAMES = frozenset(
    {
        *("messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt"),
        *("continue_final_message", "chat_template", "tokenize", "raise_exception"),
        *DEFAULT_NAMESPACE,
    }
)
"""The names of a template's variables that each conversation has, and of Hugging Face's settings
beside them."""

Message = Mapping[str, Any]  # role, content, perhaps a name, and what concerns tools
_Encode = Callable[[str, TextPlace], Iterable[int]]
# Stands in a special token's text that a message has; no text has this character (Unicode, 23.7)
_MARK = "\ufdd0"
_MAX_FACTOR = 1e12
_MAX_REPEATED = 100_000  # characters of a text, or items of a list, that a template repeats
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


class ChatError(UserError):
    """A template cannot write a conversation; the text says why."""


def rendered(
    chat: ChatFormat,
    messages: Sequence[Message],
    *,
    asks: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Returns the text of the messages and of the tools that are offered; with `asks`, up to where
    the assistant's next answer begins. `template_kwargs` are further variables of the template,
    such as `enable_thinking`, none of which is among `OWN_NAMES`. Raises `ChatError` with the
    template's words where it refuses them."""
    seen = [
        {**message, "role": message["role"].replace("developer", "system")} for message in messages
    ]
    names: dict[str, Any] = {
        "bos_token": chat.bos_token,
        "eos_token": chat.eos_token,
        "tools": tools or None,
        "documents": None,
    }
    names |= {"messages": seen, "add_generation_prompt": asks}
    try:
        return _compiled(chat.chat_template).render({**template_kwargs, **names})
    except Exception as error:  # a template is somebody's program, which may fail in any way
        raise ChatError(f"the chat template refuses the messages: {error}") from error


def plain_text(messages: Sequence[Message]) -> str:
    return rendered(ChatFormat(PLAIN_TEMPLATE, "", ""), messages)


def plain_speakers(messages: Sequence[Message]) -> list[str]:
    """Returns whom the plain template lets speak: each name once, the user's and the assistant's in
    any case."""
    roles = {"user": "User", "assistant": "Assistant"}
    names = [message.get("name") or roles.get(message["role"], "System") for message in messages]
    return list(dict.fromkeys([*roles.values(), *names]))


def format_to_train(tokenizer: Tokenizer) -> ChatFormat:
    """Returns the tokenizer's own format, or the plain one. As documents, a conversation begins
    with the start token: a template that does not write it gets it in front. Raises `ChatError`
    where no token ends an answer."""
    start = tokenizer.token_bytes(tokenizer.start_id).decode()
    chat = tokenizer.chat or ChatFormat(PLAIN_TEMPLATE, start, tokenizer.end_of_text)
    if not rendered(chat, _PROBE).startswith(start):
        chat = replace(chat, chat_template=start + chat.chat_template)
    if Chat(tokenizer, chat).end_of_turn is None:
        raise ChatError(
            "the tokenizer's chat template ends an answer with no special token of its vocabulary, so that a model "
            "could not learn to stop; put another one into its tokenizer_config.json, or none"
        )
    return chat


class Chat:
    """Conversations in one format, as a tokenizer's ids."""

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatFormat | None = None, *, encode: _Encode | None = None
    ) -> None:
        """`encode` gives the tokenizer's ids, perhaps faster. Without a format, it is the
        tokenizer's own, or the plain one for a model that was never taught to chat: without the end
        of an answer."""
        bos = "" if tokenizer.bos_id is None else tokenizer.token_bytes(tokenizer.bos_id).decode()
        self.format = chat or tokenizer.chat or ChatFormat(PLAIN_TEMPLATE, bos, "")
        self._tokenizer, self._encode = tokenizer, encode or tokenizer.encode
        self._specials = tokenizer.special_pattern

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Returns what the assistant's next answer follows; see `rendered`. Raises `ChatError`."""
        text = rendered(
            self.format,
            self._escaped([*messages]),
            asks=True,
            tools=self._escaped([*tools]),
            template_kwargs=self._escaped(template_kwargs),
        )
        return self._ids(text)

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Returns the ids up to the end of the last answer, and which of them the loss counts: the
        ids of answers, with the token that ends each. Raises `ChatError`, also where the text of
        earlier turns depends on later ones."""
        messages = self._escaped([*messages])
        ids: list[int] = []
        counted: list[bool] = []
        before = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = rendered(self.format, messages[:number], asks=True)
            whole = rendered(self.format, messages[: number + 1])
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                raise ChatError(
                    "the chat template writes earlier turns otherwise once later ones follow"
                )
            context = self._ids(prompt[len(before) :], after=before)
            answer = self._ids(whole[len(prompt) :], after=prompt)
            if self.end_of_turn not in answer:
                raise ChatError(
                    "the chat template does not end every answer with its end-of-turn token"
                )
            num_counted = len(answer) - answer[::-1].index(self.end_of_turn)
            ids += context + answer
            counted += (
                [False] * len(context)
                + [True] * num_counted
                + [False] * (len(answer) - num_counted)
            )
            before = whole
        return ids, counted

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token that ends an answer; None where the template writes none."""
        try:
            _, _, after = rendered(self.format, _PROBE).rpartition(_PROBE[-1]["content"])
        except ChatError:
            return None
        found = self._specials.findall(after)
        return self._tokenizer.special_ids[found[-1]] if found else None

    def _escaped(self, value: Any) -> Any:
        """Puts a mark into the text of special tokens, so that it stays text in what the template
        makes of it."""
        if isinstance(value, str):
            marked = lambda found: found[0][0] + _MARK + found[0][1:]  # noqa: E731
            return self._specials.sub(marked, value.replace(_MARK, ""))
        if isinstance(value, Mapping):
            return {self._escaped(name): self._escaped(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._escaped(inner) for inner in value]
        return value

    def _ids(self, text: str, *, after: str = "") -> list[int]:
        """Returns the ids of what the template has written after another text."""
        ids: list[int] = []
        place = self._tokenizer.place_after(after)
        for piece, special_id in self._tokenizer.segments(text):
            ids += map(int, self._encode(piece.replace(_MARK, ""), place))
            place = TextPlace.AFTER_SPECIAL
            if special_id is not None:
                ids.append(special_id)
        return ids


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no arithmetic takes long or makes much: one operation would hold
    Python's lock."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Raises `SecurityError` for powers, and for products of more than a number or a few
        repetitions."""
        is_number = isinstance(left, int | float) and isinstance(right, int | float)
        repeated, times = (right, left) if isinstance(left, int) else (left, right)
        is_repetition = isinstance(repeated, str | list | tuple) and isinstance(times, int)
        is_small = is_number and abs(left) < _MAX_FACTOR and abs(right) < _MAX_FACTOR
        is_short = is_repetition and len(repeated) * times <= _MAX_REPEATED
        if operator == "**" or not (is_small or is_short):
            raise SecurityError("it computes a power, or a product that is too large")
        return super().call_binop(context, operator, left, right)


class _Answers(Extension):
    """`{% generation %}` … `{% endgeneration %}`, by which some templates mark what an assistant
    says: it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(32)
def _compiled(template: str) -> Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Answers]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _as_json  # Jinja's own writes JSON for HTML
    return environment.from_string(template)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns what the filter `tojson` gives in Hugging Face's templates."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(reason)
