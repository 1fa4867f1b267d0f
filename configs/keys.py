"""Reads API keys: names, SHA-256 digests and limits. Its errors name what is wrong, and never quote a key."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from configs.files import StrictLoader
from configs.group import Group
from configs.units import Unit

MAX_KEYS = 1000  # every request is compared with all of them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class KeyLimits(Group):
    """What one key may use; none: no limit but the server's own."""

    requests_per_minute: Annotated[int, Unit("requests")] | None = Field(default=None, ge=1)
    tokens_per_minute: Annotated[int, Unit("tokens")] | None = Field(default=None, ge=1)
    max_concurrent: Annotated[int, Unit("requests")] | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class ApiKey:
    """One key: the name that logs and metrics show, and the SHA-256 of what the client sends."""

    name: str
    digest: bytes
    limits: KeyLimits


def digest_of(key: str) -> bytes:
    """The SHA-256 of a key."""
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys of a YAML mapping: by name a key, or a mapping with `key` or `sha256` and limits.

    Raises ValueError: one line a problem.
    """
    try:
        document = StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        twice = " (a name stands twice)" if "stands twice" in str(error.problem) else ""
        raise ValueError(f"line {line}: this is not the YAML of a mapping from names to keys{twice}") from None
    except yaml.YAMLError:
        raise ValueError("this is not YAML: it has characters that do not belong into a text") from None
    if not isinstance(document, dict) or not document:
        raise ValueError("should be a mapping from names to keys, such as `alice: sk-...`, with at least one key")
    if len(document) > MAX_KEYS:
        raise ValueError(f"has {len(document)} keys; at most {MAX_KEYS} are taken")
    keys, problems = [], []
    for name, value in document.items():
        try:
            keys.append(_read(name, value))
        except ValueError as error:
            problems.append(str(error))
    problems += _doubles(keys)
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(keys)


def _read(name: Any, value: Any) -> ApiKey:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("a name should be up to 64 letters, digits, `.`, `_` and `-`, in quotes if it is a number")
    fields = dict(value) if isinstance(value, dict) else {"key": value}
    given = [field for field in ("key", "sha256") if field in fields]
    if len(given) != 1:
        raise ValueError(f"{name}: needs either `key` or `sha256`")
    secret = fields.pop(given[0])
    pattern, words = {
        "key": (_KEY, "8 to 512 printable ASCII characters without spaces, in quotes if it is a number"),
        "sha256": (_DIGEST, "64 hexadecimal digits, in quotes"),
    }[given[0]]
    if not isinstance(secret, str) or not pattern.fullmatch(secret):
        raise ValueError(f"{name}: `{given[0]}` should be {words}")
    try:
        limits = KeyLimits.model_validate(fields)
    except ValidationError as error:
        known = ", ".join(KeyLimits.model_fields)
        fault = error.errors(include_input=False)[0]
        field = ".".join(map(str, fault["loc"]))
        what = f"unknown; known here: key, sha256, {known}" if fault["type"] == "extra_forbidden" else fault["msg"]
        raise ValueError(f"{name}: `{field}`: {what}") from None
    return ApiKey(name, digest_of(secret) if given[0] == "key" else bytes.fromhex(secret), limits)


def _doubles(keys: list[ApiKey]) -> Iterator[str]:
    """A line for each key that another name has too: whose it is could not be told."""
    first: dict[bytes, str] = {}
    for key in keys:
        if key.digest in first:
            yield f"{key.name}: has the same key as {first[key.digest]}; give each a key of its own"
        first.setdefault(key.digest, key.name)
