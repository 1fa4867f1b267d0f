"""Reads API keys: names, SHA-256 digests and limits. Its errors name what is wrong, and never quote a key."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from configs.files import RepeatedKey, StrictLoader
from configs.group import Group
from configs.units import Unit

MAX_KEYS = 1000  # every request is compared with all of them
_LIKE_A_KEY = re.compile(r"sk-.*|.*[A-Za-z0-9]{25}.*")  # names are public
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

    Raises ValueError: one line a problem, by the entry's line: what stands where a name belongs may be a key.
    """
    keys, problems = [], []
    for line, name, value in _entries(text):
        try:
            keys.append(_read(name, value))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    problems += _doubles(keys)
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(keys)


def _entries(text: str) -> list[tuple[int, Any, Any]]:
    """The line, the name and the value of each entry. Raises ValueError."""
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise ValueError("should be a mapping from names to keys, such as `alice: sk-...`, with at least one key")
        if len(node.value) > MAX_KEYS:
            raise ValueError(f"has {len(node.value)} keys; at most {MAX_KEYS} are taken")
        entries = [
            (name.start_mark.line + 1, _built(loader, name), _built(loader, value)) for name, value in node.value
        ]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        twice = " (a name stands twice)" if isinstance(error, RepeatedKey) else ""
        raise ValueError(f"line {line}: this is not the YAML of a mapping from names to keys{twice}") from None
    except yaml.YAMLError:
        raise ValueError("this is not YAML: it has characters that do not belong into a text") from None
    except RecursionError:
        raise ValueError("this is not the YAML of a mapping from names to keys: it is nested too deeply") from None
    names = [name for _, name, _ in entries if isinstance(name, str)]
    if len(set(names)) < len(names):
        line = next(line for line, name, _ in reversed(entries) if names.count(name) > 1)
        raise ValueError(f"line {line}: a name stands twice")
    return entries


def _built(loader: StrictLoader, node: yaml.Node) -> Any:
    """What a part of an entry says; None where it cannot be read, as the date 2024-99-99."""
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - YAML's tags have many, and their words may quote a key
        return None


def _read(name: Any, value: Any) -> ApiKey:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("a name should be up to 64 letters, digits, `.`, `_` and `-`, in quotes if it is a number")
    if _LIKE_A_KEY.fullmatch(name):
        raise ValueError("the name looks like a key, and logs show names: write `NAME: KEY`")
    fields = dict(value) if isinstance(value, dict) else {"key": value}
    given = [field for field in ("key", "sha256") if field in fields]
    if len(given) != 1:
        raise ValueError("needs either `key` or `sha256`")
    secret = fields.pop(given[0])
    pattern, words = {
        "key": (_KEY, "8 to 512 printable ASCII characters without spaces, in quotes if it is a number"),
        "sha256": (_DIGEST, "64 hexadecimal digits, in quotes"),
    }[given[0]]
    if not isinstance(secret, str) or not pattern.fullmatch(secret):
        raise ValueError(f"`{given[0]}` should be {words}")
    try:
        limits = KeyLimits.model_validate(fields)
    except ValidationError as error:
        known = ", ".join(KeyLimits.model_fields)
        fault = error.errors(include_input=False)[0]
        if fault["loc"][0] not in KeyLimits.model_fields:
            raise ValueError(f"a field is unknown; known here: key, sha256, {known}") from None
        raise ValueError(f"`{fault['loc'][0]}`: {fault['msg']}") from None
    return ApiKey(name, digest_of(secret) if given[0] == "key" else bytes.fromhex(secret), limits)


def _doubles(keys: list[ApiKey]) -> Iterator[str]:
    """A line for each key that another name has too: whose it is could not be told."""
    first: dict[bytes, str] = {}
    for key in keys:
        if key.digest in first:
            yield f"{key.name}: has the same key as {first[key.digest]}; give each a key of its own"
        first.setdefault(key.digest, key.name)
