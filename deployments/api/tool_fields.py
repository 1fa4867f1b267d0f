"""Tool fields: `tools`, `tool_choice` and the calls of a history, parsed into what chat templates read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, PlainValidator, model_validator
from pydantic_core import from_json

from deployments.api.errors import shown
from deployments.api.foreign_fields import OF_FUNCTIONS, OF_TOOLS
from deployments.api.strict_body import Body, wrong
from deployments.text.prompts import CallRule

MAX_TOOLS = 256  # OpenAI takes 128
MAX_CALLS = 256  # of one message


def _name(value: str) -> str:
    if not _PLAIN.fullmatch(value):
        raise wrong("invalid_value", "must be 1 to 128 of A-Z, a-z, 0-9 and _ - . : /")
    return value


_PLAIN = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")  # OpenAI's have no dots, colons and slashes
Name = Annotated[str, AfterValidator(_name)]


class Function(Body):
    """What a tool does: its name, what it is for, and the JSON Schema of its arguments."""

    place: ClassVar[str] = "tools.function."
    foreign: ClassVar[Mapping[str, str]] = OF_FUNCTIONS
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None

    strict: bool = False  # the arguments of a call obey `parameters`, or the request is refused


class Tool(Body):
    """One of `tools`: a function."""

    place: ClassVar[str] = "tools."
    foreign: ClassVar[Mapping[str, str]] = OF_TOOLS
    type: Literal["function"] = "function"
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _functions_only(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("type", "function") != "function":
            kind = shown(data["type"])
            raise wrong("unsupported_parameter", "{kind} is no tool of this server; send functions only", kind=kind)
        return data

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates read it, in OpenAI's form; with parameters, which some templates always write."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


def _distinct(tools: list[Tool]) -> list[Tool]:
    seen: set[str] = set()
    for tool in tools:
        if tool.function.name in seen:
            raise wrong(
                "invalid_value", "{name} is there twice; give each tool a name of its own", name=tool.function.name
            )
        seen.add(tool.function.name)
    return tools


Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Choice:
    """`tool_choice`: whether the model may call, must, or must not; and which tools."""

    mode: Mode
    names: tuple[str, ...] | None = None  # of the tools that may be called; None: all
    is_one: bool = False  # one call of the one tool

    def rule(self, tools: "list[Tool]") -> CallRule:
        """What follows for the calls of the answer, when it may have some of `tools`."""
        if not tools:
            return CallRule()
        strict = frozenset(tool.function.name for tool in tools if tool.function.strict)
        return CallRule(self.mode == "required", None if self.names is None else frozenset(self.names), strict)


AUTO = Choice("auto")
_MODES: tuple[Mode, ...] = get_args(Mode)
# answers would have to have the older form, too, and no client needs it: all that know it know tools
INSTEAD_OF_FUNCTIONS = "leave it out and send tools, whose older form it is"


def _choice(value: object) -> Choice:
    for mode in _MODES:
        if value == mode:
            return Choice(mode)
    if isinstance(value, dict) and value.get("type") == "function":
        return Choice("required", (_chosen_name(value),), is_one=True)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        allowed = value.get("allowed_tools")
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        if isinstance(allowed, dict) and isinstance(tools, list) and tools:
            for mode in _MODES[1:]:
                if allowed.get("mode") == mode:
                    return Choice(mode, tuple(map(_chosen_name, tools)))
    raise wrong(
        "invalid_value",
        'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or {"type": '
        '"allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}',
    )


def _chosen_name(value: object) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong("invalid_value", 'must name each tool, as in {"type": "function", "function": {"name": "now"}}')
    return name


def chosen(choice: Choice, tools: "list[Tool]") -> None:
    """Raise a validation error where the choice is of tools that are not there."""
    if choice.mode == "required" and not tools:
        raise wrong("invalid_value", "needs tools; send them", field="tool_choice")
    names = {tool.function.name for tool in tools}
    for name in choice.names or ():
        if name not in names:
            raise wrong("invalid_value", "{name} is none of the tools", field="tool_choice", name=shown(name))


ToolChoice = Annotated[Choice, PlainValidator(_choice)]


def _arguments(value: object) -> object:
    """Arguments as an object; none of what a model has written wrong, because a refusal would end the conversation."""
    try:
        read = from_json(value, allow_inf_nan=False) if isinstance(value, str) else value
    except ValueError:  # also where it is too deep, or has half a surrogate pair
        return {}
    return read if isinstance(read, dict) else {}


class CalledFunction(Body):
    """The function of a call in the history, which need be none of the tools."""

    place: ClassVar[str] = "messages.tool_calls.function."
    name: str = Field(min_length=1, max_length=256)
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)] = Field(default_factory=dict)


class Call(Body):
    """A tool call in the history."""

    place: ClassVar[str] = "messages.tool_calls."
    id: str = Field(default="", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: object = None  # some clients keep it of a stream

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates read it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}


Tools = Annotated[list[Tool], FailFast(), Field(max_length=MAX_TOOLS), AfterValidator(_distinct)]
