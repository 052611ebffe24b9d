"""Errors of a chat in the words of the response that it answers."""

import re

from serving.protocol.errors import ApiError

_PARAMS = (
    (r"messages(\..*)?", "input"),
    (r"max(_completion)?_tokens", "max_output_tokens"),
    (r"response_format(\.json_schema)?", "text.format"),
    (r"tools\.(\d+)\.function", r"tools.\1"),
)
"""The fields of a chat as patterns, and where a response has them."""
_IN_MESSAGES = (
    (r"\bin messages\b", "in input"),
    (r"\bmax(_completion)?_tokens\b", "max_output_tokens"),
    (r"\bresponse_format(\.json_schema)?\b", "text.format"),
    (r"\btools\.(\d+)\.function\b", r"tools.\1"),
)
"""The same in sentences, where `messages` may be a plain word."""


def in_words_of_responses(error: ApiError) -> ApiError:
    """Returns the error with the fields named as the client wrote them."""
    param, message = error.param, error.message
    for pattern, name in _PARAMS:
        if param is not None:
            param = re.sub(rf"^{pattern}", name, param)
    for pattern, name in _IN_MESSAGES:
        message = re.sub(pattern, name, message)
    return ApiError(
        message,
        status=error.status,
        param=param,
        code=error.code,
        kind=error.kind,
        headers=error.headers,
    )
