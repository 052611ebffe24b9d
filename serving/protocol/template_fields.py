"""The fields of a chat that its template reads: vLLM's `chat_template_kwargs` and OpenAI's
`reasoning_effort`."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from model.files.strict_json import shown
from model.text.chat import OWN_NAMES
from serving.protocol.errors import ApiError
from serving.protocol.request import Request

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
MAX_TEMPLATE_NAMES = 32
MAX_TEMPLATE_BYTES = 16 << 10
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def _template_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """Raises `ApiError` (400) for a name that is no variable of a template, or one of those that
    each chat has."""
    for name in values:
        if not _NAME.fullmatch(name):
            problem = "is no name of a variable; a name has a letter, then letters, digits and _, up to 64"
        elif name in OWN_NAMES:
            problem = "is set by the endpoint itself; leave it out"
        else:
            continue
        raise ApiError(
            f"chat_template_kwargs: {shown(name)} {problem}",
            param="chat_template_kwargs",
            code="invalid_value",
        )
    size = len(json.dumps(values).encode())
    if size > MAX_TEMPLATE_BYTES:
        raise ApiError(
            f"chat_template_kwargs has {size} bytes, at most {MAX_TEMPLATE_BYTES} are read",
            param="chat_template_kwargs",
            code="invalid_value",
        )
    return values


class TemplateFields(Request):
    """A chat's arguments to its template. A name that the template does not read changes nothing."""

    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_kwargs)] = Field(
        {}, max_length=MAX_TEMPLATE_NAMES
    )
    reasoning_effort: ReasoningEffort | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The template's variables, as vLLM has them: an effort is also whether to think, for
        templates that know no more, unless the request says that itself."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        thinks = {"enable_thinking": self.reasoning_effort != "none"}
        return thinks | self.chat_template_kwargs | {"reasoning_effort": self.reasoning_effort}
