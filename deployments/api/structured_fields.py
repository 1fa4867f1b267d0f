"""Structured fields: `response_format` and `structured_outputs` of a body, parsed into what the text must be."""

from typing import Annotated, Any, Self

from pydantic import PlainValidator, model_validator
from pydantic_core import from_json

from deployments.api.errors import shown
from deployments.api.sampling_fields import SamplingBody
from deployments.api.strict_body import only, wrong
from deployments.text.prompts import ContentRule

MAX_CHOICES_OF_TEXT = 4096
_ANY_OBJECT = {"type": "object"}
_NEUTRAL = {  # of structured_outputs: switches of vLLM's own backends
    "disable_any_whitespace", "disable_additional_properties", "disable_fallback", "whitespace_pattern",
    "structural_tag",
}  # fmt: skip


def _schema(value: object, field: str) -> ContentRule:
    """`value`: a schema, or its text, as some clients send it."""
    if isinstance(value, str):
        try:
            value = from_json(value, allow_inf_nan=False)
        except ValueError:
            raise wrong("invalid_value", "is no JSON; send a JSON Schema", field=_inner(field)) from None
    if not isinstance(value, dict):
        raise wrong("invalid_type", "must be a JSON Schema, which is an object", field=_inner(field))
    return ContentRule("json", value, field)


def _regex(value: object, field: str) -> ContentRule:
    if not isinstance(value, str) or not value:
        raise wrong("invalid_type", "must be a regular expression, and not empty", field=_inner(field))
    return ContentRule("regex", value, field)


def _choice(value: object, field: str) -> ContentRule:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise wrong("invalid_type", "must be a list of texts, none of them empty", field=_inner(field))
    if len(value) > MAX_CHOICES_OF_TEXT:
        most = MAX_CHOICES_OF_TEXT
        raise wrong("invalid_value", "has more than {most} texts; send fewer", most=most, field=_inner(field))
    return ContentRule("choice", value, field)


def _grammar(value: object, field: str) -> ContentRule:
    if not isinstance(value, str) or not value.strip():
        raise wrong("invalid_type", "must be a grammar in Lark's or GBNF's form", field=_inner(field))
    return ContentRule("grammar", value, field)


_READERS = {"json": _schema, "regex": _regex, "choice": _choice, "grammar": _grammar}


def _inner(field: str) -> str | None:
    """The field's place within the one that is validated."""
    return field.partition(".")[2] or None


def _known(value: dict[str, Any], names: set[str]) -> dict[str, Any]:
    for name in value:
        if name not in names:
            raise wrong("unknown_parameter", "is not a field of this request; leave it out", field=shown(name))
    return {name: one for name, one in value.items() if one is not None}


def _response_format(value: object) -> ContentRule | None:
    if not isinstance(value, dict):
        raise wrong("invalid_type", 'must be an object, as in {"type": "json_object"}')
    kind = value.get("type")
    if kind in ("text", "json_object"):
        _known(value, {"type"})
        return ContentRule("json", _ANY_OBJECT, "response_format") if kind == "json_object" else None
    if kind != "json_schema":
        raise wrong(
            "unsupported_parameter",
            "{kind} is none of text, json_object and json_schema; regular expressions, choices and grammars go into "
            "structured_outputs",
            kind=shown(kind),
            field="type",
        )
    inner = _known(value, {"type", "json_schema"}).get("json_schema")
    if not isinstance(inner, dict):
        raise wrong("missing", "is required", field="json_schema")
    fields = _known(inner, {"name", "description", "schema", "strict"})
    if "schema" not in fields:
        raise wrong("missing", "is required", field="json_schema.schema")
    if not isinstance(fields["schema"], dict):
        raise wrong("invalid_type", "must be a JSON Schema, which is an object", field="json_schema.schema")
    return ContentRule("json", fields["schema"], "response_format.json_schema.schema")


def _structured_outputs(value: object) -> ContentRule | None:
    if not isinstance(value, dict):
        raise wrong("invalid_type", 'must be an object, as in {"regex": "[0-9]+"}')
    fields = _known(value, {*_READERS, *_NEUTRAL, "json_object"})
    for name in _NEUTRAL & fields.keys():
        if fields.pop(name) is not False:
            raise wrong("unsupported_parameter", "is not supported with this value; leave it out", field=name)
    if fields.get("json_object") is False:
        del fields["json_object"]
    if len(fields) != 1:
        raise wrong("invalid_value", "must have one of json, regex, choice, grammar and json_object")
    ((name, given),) = fields.items()
    if name == "json_object":
        return ContentRule("json", _ANY_OBJECT, "structured_outputs.json_object")
    return _READERS[name](given, f"structured_outputs.{name}")


def _older(kind: str) -> PlainValidator:
    """A field of vLLM's older form."""
    return PlainValidator(lambda value: _READERS[kind](value, f"guided_{kind}"))


class StructuredBody(SamplingBody):
    """The fields that say what the text of an answer must be."""

    response_format: Annotated[ContentRule | None, PlainValidator(_response_format)] = None
    structured_outputs: Annotated[ContentRule | None, PlainValidator(_structured_outputs)] = None
    guided_json: Annotated[ContentRule | None, _older("json")] = None
    guided_regex: Annotated[ContentRule | None, _older("regex")] = None
    guided_choice: Annotated[ContentRule | None, _older("choice")] = None
    guided_grammar: Annotated[ContentRule | None, _older("grammar")] = None
    guided_decoding_backend: object = None  # there is one only

    guided_whitespace_pattern: Annotated[object, only()] = None

    @property
    def content_rule(self) -> ContentRule | None:
        """What the text must be; None: any text."""
        return next(iter(self._content_rules), None)

    @property
    def _content_rules(self) -> list[ContentRule]:
        given = [self.response_format, self.structured_outputs, self.guided_json, self.guided_regex]
        return [one for one in [*given, self.guided_choice, self.guided_grammar] if one is not None]

    @model_validator(mode="after")
    def _one_content_rule(self) -> Self:
        if len(rules := self._content_rules) > 1:
            first, second = (rule.field.partition(".")[0] for rule in rules[:2])
            raise wrong("invalid_value", "contradicts {first}; send only one of them", first=first, field=second)
        return self
