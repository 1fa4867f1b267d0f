"""JSON schemas made at random: nested objects and arrays, texts, numbers, choices, references, optional keys."""

import random
from typing import Any

_WORDS = ["name", "city", "age", "tags", "items", "kind", "price", "état", "a b", 'q"', "size", "owner", "id", "note"]


def random_schema(seed: int) -> dict[str, Any]:
    """The same for the same seed; an object at the top, as structured answers have it."""
    chance = random.Random(seed)
    schema = _object(chance, depth=0)
    if chance.random() < 0.2:
        schema["$defs"] = {"shared": _value(chance, depth=2)}
        schema["properties"]["shared"] = {"$ref": "#/$defs/shared"}
        schema["required"].append("shared")
    return schema


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    keys = chance.sample(_WORDS, chance.randint(1, 4 if depth < 2 else 2))
    required = [key for key in keys if chance.random() < 0.8] or keys[:1]
    properties = {key: _value(chance, depth + 1) for key in keys}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(chance: random.Random, depth: int) -> dict[str, Any]:
    simple = [_text, _number, _choice, _constant]
    make = chance.choice([*simple, *([_object, _array, _either] if depth < 3 else [])])
    return make(chance, depth)


def _text(chance: random.Random, depth: int) -> dict[str, Any]:
    return chance.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": 1, "maxLength": chance.randint(2, 30)},
            {"type": "string", "pattern": "^[A-Z][a-z]{1,5}(-[0-9]+)?$"},
            {"type": "string", "format": chance.choice(["date", "uuid", "ipv4", "email"])},
        ]
    )


def _number(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randint(-50, 50)
    return chance.choice(
        [
            {"type": "integer"},
            {"type": "number"},
            {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 900)},
            {"type": ["integer", "null"]},
        ]
    )


def _choice(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": chance.sample(["red", "green", "blue", 1, 2.5, None, True, "a\\nb", "日本"], chance.randint(1, 5))}


def _constant(chance: random.Random, depth: int) -> dict[str, Any]:
    return chance.choice([{"const": "fixed"}, {"type": "boolean"}, {"type": "null"}])


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 2)
    return {"type": "array", "items": _value(chance, depth + 1), "minItems": least, "maxItems": least + 3}


def _either(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_object(chance, depth + 1), _text(chance, depth)]}
