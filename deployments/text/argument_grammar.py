"""Argument grammar: the arguments of one function in the dialect of a model's calls, held to their JSON Schema."""

import json
import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

from deployments.text.call_forms import CallForm
from deployments.text.grammar_text import JSON_SPACE, GrammarError, GrammarText, any_of
from deployments.text.schema_parts import MAX_LOOKS, constants, moved, target_of, types_of

Schema = Mapping[str, Any]

_STRING_KEYWORDS = ("pattern", "format", "minLength", "maxLength", "contentEncoding")
_OBJECT_KEYWORDS = ("patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired")
_COMBINATIONS = ("allOf", "not", "if", "dependentSchemas")
_ANY_OBJECT: Schema = {"type": "object"}
_ONE_LINE = r"\x20{1,4}"  # white space in Python: Olmo has a call a line
_WORDS = {"boolean": '("True" | "False")', "null": '"None"'}  # Python's


class Arguments:
    """Writes rules for the arguments of one function."""

    def __init__(self, grammar: GrammarText, form: CallForm, schema: object, is_strict: bool, is_loose: bool) -> None:
        """`is_strict`: what the dialect cannot hold a model to is refused. `is_loose`: any arguments will do."""
        self._grammar, self._form, self._is_strict = grammar, form, is_strict
        if is_loose:
            schema = _ANY_OBJECT
        if not isinstance(schema, Mapping):
            raise GrammarError("must be a JSON Schema, which is an object", grammar.field)
        if schema.get("type", "object") != "object":
            raise GrammarError('must have "type": "object": arguments have names', grammar.field)
        self._root: Schema = {"type": "object", **schema}
        self._moved_root: Any = None
        self._declared: dict[str, str] = {}  # what Gemma's references lead to
        # what was made of parts, by their identity, with the part: it lives as long as its identity is a key
        self._made: dict[int, tuple[Any, str]] = {}
        self._checked: dict[int, Any] = {}
        self._alone: dict[str, str] = {}  # rules, by the text of their part

    def body(self) -> str:
        """The body of a rule that matches the arguments."""
        if self._form.dialect == "json":
            return self._grammar.json(self._root)
        if self._form.dialect == "gemma":
            return self._gemma_object(self._root)
        return self._tags() if self._form.dialect == "tags" else self._keywords()

    def _properties(self) -> tuple[Mapping[str, Any], set[str]] | None:
        """The arguments and those that must be there; None where any may be. Raises GrammarError for both at once."""
        for word in (*_COMBINATIONS, *_OBJECT_KEYWORDS, "anyOf", "oneOf", "$ref"):
            if word in self._root:
                self._refuse(word)
                return None
        properties, required = self._root.get("properties"), self._root.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            return None if self._root.get("additionalProperties", True) is not False else ({}, set())
        if any(name not in properties for name in required):
            self._refuse("required, with names that are not in properties,")
        return properties, {name for name in required if name in properties}

    def _refuse(self, what: str) -> None:
        """Raises GrammarError where the schema is to be held to."""
        if self._is_strict:
            message = f"{what} cannot be made sure of in this model's form of calls; leave it out, or send strict false"
            raise GrammarError(message, self._grammar.field)

    def _look(self, count: int = 1) -> None:
        """Counts parts that are looked at, of all tools together. Raises GrammarError for too many."""
        self._grammar.num_looks += count
        if self._grammar.num_looks > MAX_LOOKS:
            raise GrammarError("refers to its parts too often; make it smaller", self._field)

    # ---- tags: Qwen3-Coder, GLM, MiniMax, DeepSeek ----

    def _tags(self) -> str:
        found = self._properties()
        if found is None:
            head, _, rest = self._form.tag.partition("%KEY")
            between, _, closes = rest.partition("%VALUE")
            key = self._grammar.terminal(r'/[^<>"\s]+/')
            between = between.replace("%STRING", "true")
            literal = self._grammar.literal
            return f"({literal(head)} {key} {literal(between)} {self._grammar.until(closes)})*"
        properties, required = found
        return " ".join(
            any_of([self._grammar.rule(self._tag(key, part))]) + ("" if key in required else "?")
            for key, part in properties.items()
        )

    def _tag(self, key: str, part: Any) -> str:
        if not re.fullmatch(r'[^<>"\s](?:[^<>"\n]*[^<>"\s])?', key):
            raise GrammarError(f"this model's form of calls has no way to write the name {key[:64]!r}", self._field)
        opens, _, closes = self._form.tag.replace("%KEY", key).partition("%VALUE")
        seen = set[int]()
        types = frozenset(types_of(part, self._root, seen))
        self._look(len(seen))
        if "%STRING" in opens:
            bare = self._grammar.literal(opens.replace("%STRING", "true")) + " " + self._bare(part, types, closes)
            other = self._grammar.literal(opens.replace("%STRING", "false")) + " " + self._json_value(part, closes)
            return bare if types == {"string"} else other if "string" not in types and types else any_of([bare, other])
        is_text = "string" in types or not types
        value = self._bare(part, types, closes) if is_text else self._json_value(part, closes)
        return f"{self._grammar.literal(opens)} {value}"

    @property
    def _field(self) -> str:
        return self._grammar.field

    def _json_value(self, part: Any, closes: str) -> str:
        return f"{self._standing_alone(part)} {self._grammar.literal(closes)}"

    def _bare(self, part: Any, types: frozenset[str], closes: str) -> str:
        """A text without quotes, and what closes it."""
        values = constants(self._resolved(part))
        if values is not None:
            texts = [one for one in values if isinstance(one, str)] + (["null"] if None in values else [])
            mark = closes.strip()
            if any(mark in one for one in texts):
                raise GrammarError("has a value that this model's form of calls cannot write", self._field)
            return any_of(map(self._grammar.plain, texts)) + " " + self._grammar.literal(closes)
        self._check_text(part)
        is_ambiguous = bool(types & {"object", "array"}) or not types
        return self._grammar.until(closes, r"[^\s{\[]" if is_ambiguous and types else "")

    def _check_text(self, part: Any) -> None:
        """Raises GrammarError for keywords that say more of a text than that it is one."""
        self._look()
        resolved = self._resolved(part)
        if isinstance(resolved, Mapping) and id(resolved) not in self._checked:
            self._checked[id(resolved)] = resolved
            for word in _STRING_KEYWORDS:
                if word in resolved:
                    self._refuse(word)
            for union in ("anyOf", "oneOf", "allOf"):
                for choice in resolved.get(union) or []:
                    if isinstance(choice, Mapping) and "enum" in choice:
                        self._refuse(f"{union} with an enum")
                    self._check_text(choice)

    # ---- Python: Llama 4, LFM2, Olmo 3 ----

    def _keywords(self) -> str:
        found = self._properties()
        if found is None:
            name = self._grammar.terminal(r"/[A-Za-z_][A-Za-z0-9_]*/")
            pair = f'{name} "=" {self._grammar.json({}, _ONE_LINE)}'
            return f'({pair} (", " {pair})*)?'
        properties, required = found
        members = []
        for key, part in properties.items():
            if not key.isidentifier() or keyword.iskeyword(key):
                if key in required or self._is_strict:
                    raise GrammarError(f"a call in Python has no argument {key[:64]!r}", self._field)
                continue
            members.append((f'"{key}=" {self._python_value(part)}', key in required))
        return self._grammar.sequence(members, '", "')

    def _python_value(self, part: Any) -> str:
        """JSON is Python, too, but for three words: where one is the whole value, it is Python's."""
        self._look()
        resolved = self._resolved(part)
        if isinstance(resolved, Mapping):
            choices = resolved.get("anyOf")
            if isinstance(choices, list) and choices and not any(word in resolved for word in ("type", "enum", "$ref")):
                if id(resolved) not in self._made:
                    bodies = dict.fromkeys(self._python_value(choice) for choice in choices)
                    self._made[id(resolved)] = resolved, self._grammar.rule(any_of(bodies))
                return self._made[id(resolved)][1]
            declared = resolved.get("type")
            if isinstance(declared, list) and "enum" not in resolved:
                return any_of(self._python_value({**resolved, "type": one}) for one in dict.fromkeys(declared))
            if isinstance(declared, str) and declared in _WORDS and not {"enum", "const"} & resolved.keys():
                return _WORDS[declared]
        return self._standing_alone(part, _ONE_LINE)

    # ---- Gemma's: bare keys, strings between marks ----

    def _gemma_object(self, part: Schema) -> str:
        for word in (*_COMBINATIONS, *_OBJECT_KEYWORDS):
            if word in part:
                self._refuse(word)
        properties, required = part.get("properties"), part.get("required", [])
        if not isinstance(properties, Mapping) or not properties:
            if part.get("additionalProperties", True) is False:
                return '"{}"'
            key = self._grammar.terminal(r"/[\w.$-]+/")
            pair = f'{key} ":" {self._gemma_any()}'
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        members = []
        for key, one in properties.items():
            if not re.fullmatch(r"[\w.$-]+", key):
                raise GrammarError(f"this model's form of calls has no way to write the name {key[:64]!r}", self._field)
            members.append((f'"{key}:" {self._gemma(one)}', key in required))
        sequence = self._grammar.sequence(members, '","')
        return f'"{{" {sequence} "}}"'

    def _gemma_any(self) -> str:
        if "any" not in self._declared:
            self._declared["any"] = name = self._grammar.declare()
            kinds = [self._gemma({"type": kind}) for kind in ("string", "number", "boolean", "null", "array", "object")]
            self._grammar.define(name, any_of(kinds))
        return self._declared["any"]

    def _gemma(self, part: Any) -> str:
        """A value in Gemma's dialect, made once of each part."""
        if not isinstance(part, Mapping):
            return self._gemma_any()
        if id(part) not in self._made:
            self._look()
            self._made[id(part)] = part, self._gemma_new(part)
        return self._made[id(part)][1]

    def _gemma_new(self, part: Schema) -> str:
        """A reference is a rule, because it may lead back to itself."""
        reference = part.get("$ref")
        if isinstance(reference, str):
            if reference not in self._declared:
                self._declared[reference] = name = self._grammar.declare()
                self._grammar.define(name, any_of([self._gemma(self._target(reference))]))
            return self._declared[reference]
        values = constants(part)
        if values is not None:
            return any_of(self._gemma_constant(one) for one in values)
        choices = part.get("anyOf") or part.get("oneOf")
        if isinstance(choices, list):
            return self._grammar.rule(any_of(dict.fromkeys(self._gemma(choice) for choice in choices)))
        declared = part.get("type", "object" if "properties" in part else None)
        if isinstance(declared, list):
            return any_of(self._gemma_new({**part, "type": one}) for one in dict.fromkeys(declared))
        makers: dict[str, Callable[[Schema], str]] = {
            "string": self._gemma_string,
            "array": self._gemma_array,
            "object": self._gemma_object,
        }
        if declared in makers:
            return self._grammar.rule(makers[declared](part))
        return self._grammar.json(part) if declared is not None else self._gemma_any()

    def _gemma_string(self, part: Schema) -> str:
        self._check_text(part)
        mark = self._form.string_mark
        return f"{self._grammar.literal(mark)} {self._grammar.until(mark)}"

    def _gemma_array(self, part: Schema) -> str:
        for word in ("prefixItems", "contains", "uniqueItems"):
            if part.get(word):
                self._refuse(word)
        item, fewest, most = self._gemma(part.get("items", True)), part.get("minItems", 0), part.get("maxItems")
        if most == 0:
            return '"[]"'
        times = f"{{{max(0, fewest - 1)},{'' if most is None else most - 1}}}"
        items = f'{item} ("," {item}){times}'
        return f'"[" {items} "]"' if fewest else f'"[" ({items})? "]"'

    def _gemma_constant(self, value: Any) -> str:
        if isinstance(value, str):
            mark = self._form.string_mark
            if mark in value:
                raise GrammarError("has a value that this model's form of calls cannot write", self._field)
            literal = self._grammar.literal(mark)
            return f"{literal} {self._grammar.plain(value)} {literal}"
        return self._grammar.json({"const": value})

    # ---- what the dialects share ----

    def _target(self, reference: str) -> Any:
        """What a reference within the schema leads to. Raises GrammarError where it leads nowhere."""
        self._look(1 + reference.count("/"))
        target: Any = self._root if reference == "#" else None
        if reference.startswith("#/"):
            target = target_of(self._root, reference)
        if target is None:
            raise GrammarError(f"$ref {reference[:64]!r} leads nowhere; references start with #/", self._field)
        return target

    def _resolved(self, part: Any) -> Any:
        """The part, or what its chain of references leads to; True where the chain is a circle."""
        for _ in range(32):
            if not isinstance(part, Mapping) or not isinstance(part.get("$ref"), str):
                return part
            part = self._target(part["$ref"])
        return True

    def _standing_alone(self, part: Any, white_space: str = JSON_SPACE) -> str:
        """JSON of a part as a schema of its own: its references lead into a copy of the whole, which it carries."""
        text = json.dumps(part)
        if '"$ref"' not in text:
            return self._grammar.json(part, white_space)
        if text not in self._alone:
            self._moved_root = self._moved_root or moved({**self._root})
            alone = {**moved(part), "$defs": {"root": self._moved_root}}
            self._alone[text] = self._grammar.json(alone, white_space)
        return self._alone[text]
