"""Parts of a tool's JSON Schema: what its references lead to, and how much of it may be looked at to make a grammar."""

from collections.abc import Mapping
from typing import Any

# Clients write schemas: references make few characters say much, and each part may be reached in many ways.
MAX_LOOKS = 200_000
_MAX_STEPS = 1024  # of a reference; JSON of so many levels is not read


def target_of(root: Any, reference: str) -> Any:
    """What a reference that starts with #/ leads to; None where it leads nowhere."""
    target = root
    for step in reference[2:].split("/", _MAX_STEPS):
        if not isinstance(target, Mapping):
            return None
        target = target.get(step.replace("~1", "/").replace("~0", "~"))
    return target


def moved(part: Any) -> Any:
    """A copy whose references lead into `#/$defs/root`."""
    if isinstance(part, Mapping):
        return {
            key: f"#/$defs/root{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else moved(value)
            for key, value in part.items()
        }
    return [moved(one) for one in part] if isinstance(part, list) else part


def constants(part: Any) -> list[Any] | None:
    """The values of `enum` or `const`; None where there are none."""
    if not isinstance(part, Mapping):
        return None
    if "const" in part:
        return [part["const"]]
    values = part.get("enum")
    return values if isinstance(values, list) and values else None


def types_of(part: Any, root: Mapping[str, Any], seen: set[int]) -> list[str]:
    """Types that a part allows; empty where it says nothing.

    `seen` gains the parts looked at, by their identity: references may go in circles, and clients write them.
    """
    if not isinstance(part, Mapping) or id(part) in seen:
        return []
    seen.add(id(part))
    declared = part.get("type")
    given = declared if isinstance(declared, list) else [declared]
    types = [one for one in given if isinstance(one, str)]
    if (values := constants(part)) is not None:
        of_values = [_JSON_TYPES.get(type(value), "string") for value in values]
        if "string" not in of_values:
            types = [one for one in types if one != "string"]
        types = types or of_values
    if part.get("nullable"):
        types.append("null")
    for union in ("anyOf", "oneOf", "allOf"):
        choices = part.get(union)
        for choice in choices if isinstance(choices, list) else []:
            types += types_of(choice, root, seen)
    if isinstance(part.get("$ref"), str) and part["$ref"].startswith("#/"):
        types += types_of(target_of(root, part["$ref"]), root, seen)
    return types


_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object", list: "array"}
