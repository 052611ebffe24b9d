"""The fields of a chat about tools: what a model may call, what it has called, and what came of
it."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from serving.protocol.errors import ApiError
from serving.protocol.request import Request

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(Request):
    """A function that a model may call."""

    name: FunctionName
    description: str | None = Field(None, max_length=4096)
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
    """What a chat says about tools."""

    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _chooses_what_there_is(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise ApiError(f"tools: there are several of the name {name}", param="tools")
        choice = self.tool_choice
        if choice == "required" and not names:
            raise ApiError("tool_choice is required, but there are no tools", param="tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ApiError(
                f"tool_choice names {choice.function.name}, which is not among the tools",
                param="tool_choice",
            )
        return self

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the model may call; none with the choice `none`."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced(self) -> Sequence[Tool]:
        """The tools of which one has to be called, if any has."""
        if self.tool_choice == "required":
            return self.tools
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return []
