"""The parts of docs/ that are made of the code: the file map, the keys of the config, fields that are not taken.

    python tests/docs_pages.py     # writes them anew, between their marks

tests/pure/test_docs.py fails while a page says something else than the code.
"""

import ast
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PlainValidator
from pydantic.fields import FieldInfo

from actors.decisions.model.styles import STYLES
from configs.config import Config
from configs.units import Unit
from deployments.api.bodies import ChatBody, CompletionBody, GenerationBody, StreamOptions
from deployments.api.prompt_fields import Message
from deployments.api.token_pages import TokenizeBody
from deployments.api.tool_fields import Function
from deployments.text.response_formats import FORMATS

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("configs", "cluster", "actors", "deployments")
KINDS = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "not empty"}


def file_map() -> str:
    """What the first docstring line of every module says it owns."""
    rows = []
    for floor in FLOORS:
        paths = (ROOT / floor).rglob("*.py")
        for path in sorted(paths, key=lambda path: (path.parent, path.name != "__init__.py", path)):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            name = path.relative_to(ROOT).as_posix()
            assert docstring, f"{name}: no docstring; its first line says in one sentence what it owns"
            rows.append((name.removesuffix("__init__.py"), docstring.splitlines()[0]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(["```", *(f"{name:<{width}}  {sentence}" for name, sentence in rows), "```"])


def configuration() -> str:
    """A table for each group of keys."""
    plain = {name: field for name, field in Config.model_fields.items() if not _group(field)}
    sections = [_section("", "Keys outside of groups.", plain)]
    for name, field in Config.model_fields.items():
        if group := _group(field):
            sections.append(_section(name, group.__doc__ or "", group.model_fields))
    return "\n\n".join(sections)


def keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its full name, groups left out."""
    for name, field in Config.model_fields.items():
        if group := _group(field):
            yield from ((f"{name}.{inner}", of_inner) for inner, of_inner in group.model_fields.items())
        else:
            yield name, field


def _section(name: str, words: str, fields: dict[str, FieldInfo]) -> str:
    head = [f"### {name or 'device, substitutions'}", "", words.splitlines()[0], ""]
    head += ["| key | takes | default | bounds | unit | what it is, and when to set it |", "|---|---|---|---|---|---|"]
    return "\n".join(head + [_row(f"{name}.{key}" if name else key, field) for key, field in fields.items()])


def _row(key: str, field: FieldInfo) -> str:
    cells = [f"`{key}`", _takes(field.annotation), _default(field), _bounds(field), _unit(field), field.description]
    return "| " + " | ".join((cell or "").replace("|", "\\|") for cell in cells) + " |"


def _group(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _takes(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_takes(one) for one in inner if one is not types.NoneType)
    if origin is typing.Annotated:
        return _takes(inner[0])
    if origin is tuple:
        return f"list of {_takes(inner[0])}s"
    if origin is dict:
        return f"mapping of {_takes(inner[0])} to {_takes(inner[1])}"
    return KINDS[kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _bounds(field: FieldInfo) -> str:
    found = [(name, getattr(one, name)) for one in _metadata(field) for name in BOUNDS if hasattr(one, name)]
    return ", ".join(BOUNDS[name].format(value) for name, value in found if value is not None)


def bounds_of(field: FieldInfo) -> list[str]:
    """The numbers among a field's bounds; the end of what is below 2^n is 2^n."""
    found = [getattr(one, name, None) for one in _metadata(field) for name in (*BOUNDS, "max_length")]
    return [_number(value) for value in found if value is not None]


def _number(value: float) -> str:
    size = abs(value)
    if size >= 2**31 and size == 2 ** (int(size).bit_length() - 1):
        return f"{'-' if value < 0 else ''}2^{int(size).bit_length() - 1}"
    return str(value)


def _unit(field: FieldInfo) -> str:
    return next((one.name for one in _metadata(field) if isinstance(one, Unit)), "")


def _metadata(field: FieldInfo) -> list[Any]:
    """Of the field and of the types in its annotation."""
    pending, found = [field.annotation], list(field.metadata)
    while pending:
        kind = pending.pop()
        if typing.get_origin(kind) is typing.Annotated:
            found += typing.get_args(kind)[1:]
        pending += [one for one in typing.get_args(kind) if not isinstance(one, str)]
    return found + [inner for one in found if isinstance(one, FieldInfo) for inner in one.metadata]


def other_fields() -> str:
    """Request fields that are passed or refused, body by body."""
    own_of_completions = set(CompletionBody.model_fields) - set(GenerationBody.model_fields)
    own_of_chats = set(ChatBody.model_fields) - set(GenerationBody.model_fields)
    bodies = [
        ("Both endpoints", GenerationBody, set(GenerationBody.model_fields)),
        ("`stream_options`", StreamOptions, set(StreamOptions.model_fields)),
        ("`/v1/completions`", CompletionBody, own_of_completions),
        ("`/v1/chat/completions`", ChatBody, own_of_chats),
        ("A message", Message, set(Message.model_fields)),
        ("A tool's `function`", Function, set(Function.model_fields)),
        ("`/tokenize`", TokenizeBody, set(TokenizeBody.model_fields)),
    ]
    rows = ["| where | passed | refused, but for the values named |", "|---|---|---|"]
    for where, body, names in bodies:
        fields = {name: field for name, field in body.model_fields.items() if name in names}
        passed = [f"`{name}`" for name, field in fields.items() if kind_of(field) == "passed"]
        refused = [_refusal(name, field) for name, field in fields.items() if kind_of(field) == "refused"]
        rows.append(f"| {where} | {', '.join(passed)} | {' · '.join(refused)} |")
    return "\n".join(rows)


def kind_of(field: FieldInfo) -> str:
    """What happens to a request field: it is taken, passed or refused."""
    if _neutral(field) is not None:
        return "refused"
    return "passed" if field.annotation is object else "taken"


def _refusal(name: str, field: FieldInfo) -> str:
    neutral = ", ".join(f"`{json.dumps(value)}`" for value in _neutral(field) or ())
    return f"`{name}` (only {neutral})" if neutral else f"`{name}`"


def _neutral(field: FieldInfo) -> tuple[object, ...] | None:
    """The values that a refused field may have; None where it is not refused. See strict_body.only."""
    checks = [inspect.getclosurevars(one.func).nonlocals for one in field.metadata if isinstance(one, PlainValidator)]
    return next((check["neutral"] for check in checks if "neutral" in check), None)


def styles() -> str:
    """The tensor-parallel styles."""
    rows = [f"| `{name}` | {style.meaning} |" for name, style in STYLES.items()]
    return "\n".join(["| style | meaning |", "|---|---|", *rows])


def response_formats() -> str:
    """The formats of tool calls and thinking, in the order in which they are looked for."""
    rows = []
    for name, entry in FORMATS.items():
        marks = " or ".join(f"`{mark}`".replace("|", "\\|") for mark in entry["marks"])
        rows.append(f"| `{name}` | {entry['models']} | {marks} |")
    return "\n".join(["| format | models | told by |", "|---|---|---|", *rows])


def launches() -> str:
    """The launches of a layer, as tests/families/launches.py has counted them; families that are alike in one row."""
    counted = json.loads((ROOT / "tests/data/launches.json").read_text(encoding="utf-8"))
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for family, found in counted.items():
        why = "; ".join(f"`{part}`: {_first_reason(reason)}" for part, reason in found["aside"].items())
        alike.setdefault((tuple(found["launches"]), why or "nothing"), []).append(family)
    rows = [
        f"| {', '.join(families)} | {' and '.join(map(str, counts))} | {why} |"
        for (counts, why), families in sorted(alike.items())
    ]
    return "\n".join(["| family | launches | what stays the model's own, and why |", "|---|---|---|", *rows])


def _first_reason(reasons: str) -> str:
    """Without how often it occurs in a tiny model."""
    return re.sub(r" \(\d+ places\)", "", reasons).split("; ")[0]


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/architecture.md": {"file map": file_map},
    "docs/configuration.md": {"keys": configuration},
    "docs/api.md": {"other fields": other_fields, "response formats": response_formats},
    "docs/models.md": {"styles": styles},
    "docs/gpu.md": {"launches": launches},
}


def as_it_should_be(page: str) -> str:
    """A page's text with its parts made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for mark, make in PAGES[page].items():
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        assert begin in text and end in text, f"{page}: the marks {begin} and {end} must be in it"
        made = f"{begin}\n{make()}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(as_it_should_be(name), encoding="utf-8")
