"""Strict bodies: raw bytes become a pydantic model, or an ApiError that names the first wrong field and the remedy."""

import json
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from deployments.api.errors import ApiError, shown

MAX_IGNORED = 32  # unknown fields of one body: the header that names them has a bounded size
_ALIKE = 0.85  # as difflib measures it: temprature is temperature
_NO_SLIPS = frozenset({"models"})  # nearly a field's name, but OpenRouter's: what to fall back on, and there is one
MAX_CONTAINERS = 10_000  # lists and objects of one body: reading each takes microseconds of the event loop
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # possessive, and takes unterminated ones: linear


def wrong(code: str, message: str, **context: object) -> PydanticCustomError:
    """A validation error in our words; `field` in the context names a field of the object that is validated."""
    return PydanticCustomError(code, message, context)


def only(*neutral: object, instead: str = "") -> PlainValidator:
    """Accept only values that do not change the answer; null is always accepted. `instead`: another remedy."""

    def check(value: object) -> object:
        if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral):
            return value
        remedy = instead or (f"leave it out or send {json.dumps(neutral[0])}" if neutral else "leave it out")
        raise wrong("unsupported_parameter", "is not supported with this value; {remedy}", remedy=remedy)

    return PlainValidator(check)


class Body(BaseModel):
    """A JSON object with strict types: null means absent, and unknown fields are refused, or noted and ignored.

    Never ignored is what would change the answer: a name in `foreign`, and in a request one that is nearly a field's.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
    place: ClassVar[str] = ""  # what stands before the names of its unknown fields
    foreign: ClassVar[Mapping[str, str]] = MappingProxyType({})  # names of other servers, and what to do instead

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: object, info: ValidationInfo) -> object:
        """`info.context`: a list for the names of ignored fields; None: unknown fields are refused."""
        if not isinstance(data, dict):
            raise wrong("invalid_type", "must be a JSON object")
        for name in data:
            if name not in cls.model_fields:
                cls._unknown(name, data[name], info.context)
        return {name: value for name, value in data.items() if value is not None and name in cls.model_fields}

    @classmethod
    def _unknown(cls, name: str, value: object, ignored: list[str] | None) -> None:
        if value is not None and (instead := _foreign_by_plain_name(cls).get(_plain(name))):
            raise wrong(
                "unsupported_parameter", "is no field of this server; {instead}", field=shown(name), instead=instead
            )
        if ignored is None:
            raise wrong("unknown_parameter", "is not a field of this request; leave it out", field=shown(name))
        known_as = cls.place + shown(name)
        if value is None or known_as in ignored:
            return
        if len(ignored) >= MAX_IGNORED:  # before names are compared, which takes a tenth of a millisecond
            raise wrong("unknown_parameter", "is one unknown field too many; leave them out", field=shown(name))
        if alike := cls._nearly(name):
            raise wrong("unknown_parameter", "is not a field; send {alike}", field=shown(name), alike=alike)
        ignored.append(known_as)

    @classmethod
    def _nearly(cls, name: str) -> str | None:
        """The field that may change an answer and that `name` nearly is."""
        fields = _meaningful(cls)
        alike = [] if name in _NO_SLIPS else get_close_matches(_plain(name), fields, 1, _ALIKE)
        return fields[alike[0]] if alike else None


def _plain(name: str) -> str:
    """A name however it is written: maxTokens and MAX_TOKENS are max_tokens. Cut: none of ours is so long."""
    return name[:64].lower().replace("_", "").replace("-", "")


@cache
def _meaningful(kind: type[Body]) -> dict[str, str]:
    """The fields that may change an answer, by their plain names."""
    fields = kind.model_fields.items()
    return {
        _plain(name): name for name, one in fields if len(name) > 3 and (one.annotation is not object or one.metadata)
    }


@cache
def _foreign_by_plain_name(kind: type[Body]) -> dict[str, str]:
    own = {_plain(name) for name in kind.model_fields}
    return {plain: instead for name, instead in kind.foreign.items() if (plain := _plain(name)) not in own}


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_body(raw: bytes, kind: type[AnyBody], ignored: list[str] | None = None) -> AnyBody:
    """The body in `raw`. Raises ApiError (400) that names the first wrong field and the remedy.

    `ignored` gets the names of unknown fields; None: they are refused.
    """
    return check_body(read_json(raw), kind, ignored)


def read_json(raw: bytes) -> Any:
    """What `raw` says, as plain data. Raises ApiError (400) for what is no JSON, or too much of it."""
    if _num_openers(raw) > MAX_CONTAINERS and _num_openers(_STRING.sub(b"", raw)) > MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {MAX_CONTAINERS} lists and objects; send several requests")
    try:
        return from_json(raw, allow_inf_nan=False)  # unlike json.loads: bounded depth, no NaN, no lone surrogates
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None


def check_body(data: Any, kind: type[AnyBody], ignored: list[str] | None = None) -> AnyBody:
    """Plain data as a body, as `parse_body` has it. Raises ApiError (400)."""
    try:
        return kind.model_validate(data, context=ignored)
    except ValidationError as error:
        raise as_api_error(error.errors(include_url=False, include_input=False)[0]) from None


def _num_openers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


_LISTS = ("stop", "prompt", "logit_bias", "stop_token_ids", "tokens", "allowed_token_ids", "bad_words")


_OWN_WORDS: dict[str, Callable[[ErrorDetails], str]] = {
    "missing": lambda error: "is required",
    "dict_type": lambda error: "must be a JSON object",
    "literal_error": lambda error: f"must be {error['ctx']['expected']}",
    "too_long": lambda error: f"has more than {error['ctx']['max_length']} entries; send fewer",
    "string_too_short": lambda error: "must not be empty",
}


def as_api_error(error: ErrorDetails) -> ApiError:
    """One problem as an ApiError (400), in our words."""
    path = [str(part) for part in error["loc"]]
    field = error.get("ctx", {}).get("field")
    param = ".".join([*path, *([field] if field else [])]) or None
    words = _OWN_WORDS.get(error["type"])
    message = words(error) if words else error["msg"].replace("Input should be", "must be")
    code = error["type"] if error["type"] in ("unsupported_parameter", "unknown_parameter") else None
    if error["loc"] and error["loc"][0] in _LISTS:
        param = str(error["loc"][0])  # clients look for the field's own name
    return ApiError(400, f"{param or 'the body'}: {message}", param=param, code=code)
