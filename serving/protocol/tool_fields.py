"""The fields of a chat about tools: what a model may call, what it has called, and what came of
it."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from serving.protocol.errors import ApiError
from serving.protocol.request import Request

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(Request):
    """A function that a model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Request):
    type: Literal["function"]
    function: Function

    @property
    def seen(self) -> dict[str, Any]:
        """The tool as a chat template sees it."""
        shown = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {}} | shown}


class NamedFunction(Request):
    name: FunctionName


class NamedTool(Request):
    """The one function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Request):
    """Some of the tools: with the mode `required` one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class SomeTools(Request):
    """A choice among some of the tools, of which the prompt has all."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["auto", "none", "required"] | NamedTool | SomeTools
_CHOICES: dict[str, type[Request]] = {"function": NamedTool, "allowed_tools": SomeTools}


def read_choice(value: Any, choices: Mapping[str, type[Request]], *, shapes: str) -> Any:
    """Returns a choice of tools; a choice that is an object has one of these types. Raises
    `ApiError` (400) in words, as several types would each say what they miss."""
    if value is None or isinstance(value, Request) or value in ("auto", "none", "required"):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    try:
        return choices[str(kind)].model_validate(value)
    except (KeyError, ValidationError):
        raise ApiError(
            f'tool_choice: expected "auto", "none", "required", {shapes}',
            param="tool_choice",
            code="invalid_value",
        ) from None


def _tool_choice(value: Any) -> Any:
    shapes = (
        '{"type": "function", "function": {"name": NAME}}, or {"type": "allowed_tools", "allowed_tools": '
        '{"mode": "auto" or "required", "tools": [{"type": "function", "function": {"name": NAME}}]}}'
    )
    return read_choice(value, _CHOICES, shapes=shapes)


class CalledFunction(Request):
    name: FunctionName
    arguments: str
    parsed_arguments: Any = None  # the same, which OpenAI's clients send back


class ToolCall(Request):
    """A call in an assistant's earlier message."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that joined a stream's parts send it back

    @property
    def seen(self) -> dict[str, Any]:
        """The call as a chat template sees it, with its arguments as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = self.function.arguments  # it was cut off
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolFields(Request):
    """A chat's fields about tools."""

    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _chooses_what_there_is(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise ApiError(f"tools: there are several of the name {name}", param="tools")
        if self.tool_choice == "required" and not names:
            raise ApiError("tool_choice is required, but there are no tools", param="tool_choice")
        for name in self._chosen_names or ():
            if name not in names:
                raise ApiError(
                    f"tool_choice names {name}, which is not among the tools", param="tool_choice"
                )
        return self

    @property
    def _chosen_names(self) -> set[str] | None:
        """The tools that the choice names, None if it names none."""
        match self.tool_choice:
            case NamedTool(function=function):
                return {function.name}
            case SomeTools(allowed_tools=allowed):
                return {tool.function.name for tool in allowed.tools}
        return None

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the prompt has; none with the choice `none`."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def allowed(self) -> Sequence[Tool]:
        """The tools that may be called."""
        names = self._chosen_names
        return [tool for tool in self.offered if names is None or tool.function.name in names]

    @property
    def forced(self) -> Sequence[Tool]:
        """The tools of which one has to be called, if any has."""
        match self.tool_choice:
            case "required" | NamedTool() | SomeTools(allowed_tools=AllowedTools(mode="required")):
                return self.allowed
        return []

    @property
    def calls_several(self) -> bool:
        """Whether an answer may have several calls."""
        return self.parallel_tool_calls and not isinstance(self.tool_choice, NamedTool)
