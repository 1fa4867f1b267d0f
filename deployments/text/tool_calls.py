"""Tool calls: what a model has written, in any dialect, becomes names and JSON arguments, or is found to be no call."""

import ast
import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import regex
from transformers.utils.chat_parsing.content_parsers import process_field
from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

from deployments.text.prompts import Conversation
from deployments.text.schema_parts import types_of

Schemas = Mapping[str, Mapping[str, Any]]  # tool → JSON Schema of its arguments

PYTHON_CALLS = "python-calls"
CLOSE_THEMSELVES = ("json", PYTHON_CALLS)  # brackets tell whether they are whole; tags that are missing do not show
_MAX_PYTHON_CHARS = 256 * 1024  # its syntax tree takes a hundred times as much
_MATCH_S = 1.0  # for all tags of one call: patterns may come with a checkpoint
_SOURCE = "<a tool call>"
warnings.filterwarnings("ignore", category=SyntaxWarning, module=_SOURCE)  # what models write is not our code
warnings.filterwarnings("ignore", category=DeprecationWarning, module=_SOURCE)
_WORDS = {"true": True, "false": False, "null": None}  # JSON's, which some models write among Python's


@dataclass(frozen=True)
class ToolCall:
    """One call: `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


def read_calls(
    field: ResponseTemplateField, body: str, captures: dict[str, str], tools: Schemas
) -> list[tuple[str, str]] | None:
    """Name and arguments of each call in the body of a region; None where it is no call, or not one of these tools."""
    try:
        if field.content in _DIALECTS and "value_parser" not in field.content_args:
            value = _DIALECTS[field.content](field, body, captures, tools)
            body, field = (
                json.dumps(value, allow_nan=False),
                dataclasses.replace(field, content="json", content_args={}),
            )
        value = process_field(body, field, captures)  # in the shape that the template asks for
        is_bare = field.close_re is None  # without marks, other JSON may look like a call
        calls = [_call(one, tools, is_bare) for one in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError, TimeoutError):
        return None
    return calls or None


class CallIds:
    """Gives the calls of one answer their ids."""

    def __init__(self, style: str | None, salt: str, num_calls: int) -> None:
        """`style`: see response_formats.py. `num_calls`: of the conversation before the answer."""
        self._style, self._salt, self._index = style, salt, num_calls

    def next(self, name: str) -> str:
        """The id of the next call, of this function."""
        index, self._index = self._index, self._index + 1
        digest = _digest(f"{self._salt} {index}")
        return _call_id(self._style, digest, name, index) or f"call_{digest[:24]}"


def with_call_ids(conversation: Conversation, style: str | None) -> Conversation:
    """The conversation with ids of calls as the model knows them: clients may bring calls that others have made."""
    if style is None or not conversation.num_calls:
        return conversation
    renamed: dict[str, str] = {}
    messages, index = [], 0
    for message in conversation.messages:
        calls = []
        for call in message.get("tool_calls") or []:
            renamed[call["id"]] = _call_id(style, call["id"], call["function"]["name"], index) or call["id"]
            index += 1
            calls.append({**call, "id": renamed[call["id"]]})
        changed: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if message.get("tool_call_id") in renamed:
            changed["tool_call_id"] = renamed[message["tool_call_id"]]
        messages.append({**message, **changed})
    return dataclasses.replace(conversation, messages=messages)


def _call_id(style: str | None, known: str, name: str, index: int) -> str | None:
    """The id of a call in a style; None where the style leaves it open. `known` tells the call from all others."""
    if style == "kimi":
        return f"functions.{name}:{index}"
    if style == "nine":
        return known if regex.fullmatch(r"[A-Za-z0-9]{9}", known) else _digest(known)[:9]
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _call(value: Any, tools: Schemas, is_bare: bool) -> tuple[str, str]:
    """Raises KeyError, TypeError or ValueError for what is no call of one of the tools."""
    made = value["function"] if isinstance(value.get("function"), dict) else value
    name = made["name"] if "name" in made else made["tool_name"]
    arguments = next((made[key] for key in ("arguments", "parameters") if key in made), None)
    if arguments is None and is_bare and "arguments" not in made:
        raise ValueError("an object that has a name, but is no call")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if name not in tools or not isinstance(arguments or {}, dict):
        raise ValueError("no such tool, or arguments that are no object")
    return name, _written(arguments or {})


def _written(arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can only write it as an escape
        text = json.dumps(arguments, allow_nan=False)
    return text


def _json(field: ResponseTemplateField, body: str, captures: dict[str, str], tools: Schemas) -> Any:
    for opens, closes in field.content_args.get("string_delims", []):
        body = _plain_strings(body, opens, closes, bool(field.content_args.get("unquoted_keys")))
    return json.loads(body)


def _plain_strings(body: str, opens: str, closes: str, has_bare_keys: bool) -> str:
    """JSON, of text whose strings stand between marks of their own and whose keys may have no quotes."""
    parts = body.replace(closes, opens).split(opens)
    if len(parts) % 2 == 0:
        raise ValueError("a string does not end")
    for at, part in enumerate(parts):
        if at % 2:
            parts[at] = json.dumps(part)
        elif has_bare_keys:
            part = regex.sub(r"\bNone\b", "null", part)  # as Gemma's template writes it
            parts[at] = regex.sub(r"([{,]\s*+)([\w.$-]++)(\s*+:)", r'\1"\2"\3', part)
    return "".join(parts)


def _tags(field: ResponseTemplateField, body: str, captures: dict[str, str], tools: Schemas) -> dict[str, Any]:
    schema = tools.get(captures.get("name", ""), {})
    found: dict[str, Any] = {}
    types: dict[str, frozenset[str]] = {}
    pattern = regex.compile(rf"\s*?(?:{field.content_args['tag_pattern']})", regex.DOTALL)
    end, deadline = 0, time.monotonic() + _MATCH_S
    # tag after tag: a search would begin anew at each character of what is none
    while (tag := pattern.match(body, end, timeout=_left_s(deadline))) and tag.end() > end:
        end = tag.end()
        groups = tag.groupdict()
        key, value, is_text = groups["key"].strip(), groups["value"], groups.get("string")
        if is_text is None:
            if key not in types:
                types[key] = value_types(schema, key)
            found[key] = typed(value, types[key])
        else:
            found[key] = value if is_text == "true" else json.loads(value)
    if not found and body.lstrip().startswith("{"):  # DeepSeek's may hold JSON instead
        return _object(json.loads(body))
    if body[end:].strip():
        raise ValueError("text between the tags, or a tag that does not end")
    return found


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def value_types(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """Types that JSON Schema allows for the property `key`; empty where it says nothing."""
    properties = schema.get("properties")
    return frozenset(types_of(properties.get(key), schema, set())) if isinstance(properties, Mapping) else frozenset()


def typed(raw: str, types: frozenset[str]) -> Any:
    """Bare text as a value of one of the types: text where it may be text, or fits none of them."""
    bare = raw.strip()
    if "null" in types and bare in ("null", "None"):
        return None
    if types & {"object", "array"} and bare[:1] in ("{", "["):
        try:
            value = json.loads(bare)
            if ("object" if isinstance(value, dict) else "array") in types:
                return value
        except (ValueError, RecursionError):
            pass
    if "string" in types:
        return raw
    if "boolean" in types and bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    if types & {"integer", "number"} and len(bare) < 400 and regex.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", bare):
        number = float(bare)
        if regex.fullmatch(r"-?\d+", bare):
            return int(bare)
        if "number" in types:
            return number
        if number.is_integer():
            return int(number)
    return raw


def _python(field: ResponseTemplateField, body: str, captures: dict[str, str], tools: Schemas) -> list[dict[str, Any]]:
    if len(body) > _MAX_PYTHON_CHARS:
        raise ValueError("too long")
    text = body.strip()
    if not text.startswith("["):  # a call a line; strings may have what splitlines() takes for a line's end
        lines = (line.rstrip(", \r") for line in text.split("\n"))
        text = f"[{','.join(filter(None, lines))}]"
    tree = ast.parse(text, _SOURCE, mode="eval").body
    if not isinstance(tree, ast.List):
        raise ValueError("no list of calls")
    return [_python_call(call) for call in tree.elts]


def _python_call(call: ast.expr) -> dict[str, Any]:
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("no call with named arguments")
    arguments = {str(keyword.arg): ast.literal_eval(_Words().visit(keyword.value)) for keyword in call.keywords}
    return {"name": ast.unparse(call.func), "arguments": arguments}


class _Words(ast.NodeTransformer):
    """JSON's true, false and null as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id])  # a KeyError for any other name


_DIALECTS: dict[str, Callable[[ResponseTemplateField, str, dict[str, str], Schemas], Any]] = {
    "json": _json,
    "xml-inline": _tags,
    PYTHON_CALLS: _python,
}
