"""Values as people write them: whole numbers such as `20M` tokens, `64MiB` or `1e6`, `auto` for a GPU, and in our
words, what was expected in place of a value that pydantic refuses."""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, get_args

from model.hardware.processor import num_gpus_here

_AMOUNT = re.compile(
    r"(?P<number>\d+(_\d+)*(\.\d+)?(e\+?\d{1,2})?) ?(?P<unit>[a-z]*)", re.IGNORECASE
)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1}
_BYTES |= {
    f"{prefix}{end}": 1000**power for power, prefix in enumerate("kmgt", 1) for end in ("", "b")
}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}

_Words = Callable[[dict[str, Any]], str]
_WHOLE = "expected a whole number, such as 20000000, 20M or 1e6"
_WHOLE_BYTES = f"{_WHOLE} (of bytes: 64MiB, 2GB)"
_LINES = "expected `name: value` lines below it"

_EXPECTED: dict[str, _Words] = {
    "float_parsing": lambda context: "expected a number, such as 0.001 or 1e-3",
    "float_type": lambda context: "expected a number, such as 0.001 or 1e-3",
    "finite_number": lambda context: "expected a finite number",
    "bool_parsing": lambda context: "expected true or false",
    "bool_type": lambda context: "expected true or false",
    "string_type": lambda context: "expected a text",
    "list_type": lambda context: "expected a list, such as [a, b]",
    "literal_error": lambda context: f"expected {context['expected']}",
    "greater_than": lambda context: f"expected more than {context['gt']:g}",
    "greater_than_equal": lambda context: f"expected at least {context['ge']:g}",
    "less_than": lambda context: f"expected less than {context['lt']:g}",
    "less_than_equal": lambda context: f"expected at most {context['le']:g}",
    "string_pattern_mismatch": lambda context: (
        "expected an ending, such as .md"
        if context["pattern"].startswith(r"^\.")
        else "expected letters, digits and `.`, `_` or `-`"
        + (", at most 64, and a letter or a digit first" if "{0,63}" in context["pattern"] else "")
    ),
}
"""Words by the type of the problem, from its bounds."""


def whole_number(text: str, *, is_bytes: bool) -> int | None:
    """Returns the number of things, or of bytes, that the text says; None if it is no whole
    number."""
    match = _AMOUNT.fullmatch(text.strip())
    unit = (_BYTES if is_bytes else _COUNTS).get(match["unit"].lower()) if match else None
    if match is None or unit is None:
        return None
    value = Decimal(match["number"]) * unit
    return int(value) if value == value.to_integral_value() else None


def is_whole_number(annotation: Any) -> bool:
    """Says whether a setting of this type holds a whole number, also beside None or within
    bounds."""
    kinds = get_args(annotation)
    if getattr(annotation, "__metadata__", None) is not None:  # Annotated: the type, and its bounds
        return is_whole_number(kinds[0])
    return annotation is int or any(is_whole_number(kind) for kind in kinds)


def expectation(problem: dict[str, Any], *, siblings: list[str]) -> str | None:
    """Returns what was expected in place of the value, and None for a problem that has words of its
    own. `siblings` are the names of the settings below the one that is wrong."""
    kind = str(problem["type"])
    if kind.startswith("int_"):
        return _WHOLE_BYTES if str(problem["loc"][-1]).endswith("_bytes") else _WHOLE
    if kind in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        return f"{_LINES}, such as `{siblings[0]}: …`" if siblings else _LINES
    words = _EXPECTED.get(kind)
    return None if words is None else words(problem.get("ctx", {}))


def gpu_or_not(value: Any) -> Any:
    """Settles `auto`, so that what is recorded is true or false."""
    return num_gpus_here() > 0 if value == "auto" else value


def require_own_gpu(values: Any) -> None:
    """Raises `ValueError` where this machine is asked for the GPUs of another one."""
    match values:
        case {"scaling": {"use_gpu": "auto"}, "cluster": {"address": str(address)}}:
            raise ValueError(
                f"scaling.use_gpu=auto asks this machine, and the run is on the cluster at {address}: set true or false"
            )
