"""Reads Serve config files into a Config; its errors list every mistake at once, by key and with a remedy."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.config import Config

PROJECT_ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "configs/demo.yaml"  # what error messages point to


class RepeatedKey(yaml.MarkedYAMLError):
    """A key occurs twice in one mapping."""


class StrictLoader(yaml.SafeLoader):
    """YAML's safe subset; a key that occurs twice in one mapping is refused (YAML would silently keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the safe loader does. Raises RepeatedKey."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise RepeatedKey(
                    problem=f"the key {key.value!r} stands twice in one mapping (first in line {seen[key.value]}); "
                    "keep one of them",
                    problem_mark=key.start_mark,
                )
            seen[key.value if isinstance(key, yaml.ScalarNode) else str(key)] = line
        return super().construct_mapping(node, deep)


def read_config(path: str | Path) -> Config:
    """The Config in the `args` of a Serve config file's first application.

    Raises ValueError: one line a problem, `file: key: what is wrong, and what would work`.
    """
    application = read_application(path)
    args = application.get("args", {})
    if not isinstance(args, dict):
        raise ValueError(f"{path}: applications.0.args: expects a mapping, got {_shown(args)}; see {EXAMPLE}")
    return parse_args(args, where=f"{path}: args")


def read_application(path: str | Path) -> dict[str, Any]:
    """The first application of a Serve config file, as written. Raises ValueError like `read_config`."""
    applications = read_document(path).get("applications")
    if not isinstance(applications, list) or not applications:
        raise ValueError(
            f"{path}: applications: missing or empty, so this is no Serve config file; "
            f"it needs a list with one application, and our keys in its `args`: see {EXAMPLE}"
        )
    if not isinstance(applications[0], dict):
        raise ValueError(
            f"{path}: applications.0: expects a mapping, got {_shown(applications[0])}; "
            f"an application has the keys name, import_path and args: see {EXAMPLE}"
        )
    return applications[0]


def read_document(path: str | Path) -> dict[str, Any]:
    """A whole YAML file. Raises ValueError when it cannot be read, is no YAML, repeats a key or is no mapping."""
    try:
        loader = StrictLoader(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); name a Serve config file, for example {EXAMPLE}") from None
    try:
        document = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{path}: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: is no YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expects a mapping at the top, got {_shown(document)}; see {EXAMPLE}")
    return document


def parse_args(args: dict[str, Any], where: str = "args") -> Config:
    """A checked Config from an application's `args`.

    Raises ValueError: one line a problem, `where.key: what is wrong, and what would work`, all problems at once.
    """
    try:
        return Config.model_validate(args)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise ValueError("\n".join(_explain(problem, where) for problem in problems)) from None


def _explain(problem: ErrorDetails, where: str) -> str:
    """One problem as one line for people."""
    path = problem["loc"]
    key = ".".join([where, *map(str, path)])
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default; add it (see {EXAMPLE})"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggest([str(part) for part in path])}"
    if problem["type"] in ("model_type", "dict_type"):
        return f"{key}: should be a mapping, but it is {_shown(problem['input'])}; remove the key to keep its defaults"
    wish = problem["msg"].replace("Input should", "should").removeprefix("Value error, ")
    remedy = "; remove the quotes" if isinstance(problem["input"], str) and _is_number(problem["input"]) else ""
    return f"{key}: {wish}, but it is {_shown(problem['input'])}{remedy}"


def _suggest(path: list[str]) -> str:
    """What the user may have meant by an unknown key: the nearest key of its group, else of all keys."""
    known = dict(_keys(Config))
    group, name = path[:-1], path[-1]
    siblings = [full[-1] for full in known if list(full[:-1]) == group]
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"did you mean {'.'.join([*group, near[0]])}?"
    elsewhere = [full for full in known if full[-1] == name]
    if not elsewhere:
        close = difflib.get_close_matches(name, [full[-1] for full in known], n=1, cutoff=0.8)
        elsewhere = [full for full in known if full[-1] in close]
    if elsewhere:
        return f"did you mean {'.'.join(elsewhere[0])}?"
    return f"known here: {', '.join(siblings)}"


def _keys(group: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a group and of the groups in it, as (path, annotation)."""
    for name, field in group.model_fields.items():
        yield (*prefix, name), field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, (*prefix, name))


def _shown(value: object) -> str:
    """A value as the user wrote it, with its type, for error messages."""
    kinds = {str: "a string", bool: "a truth value", int: "an integer", float: "a number", list: "a list"}
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kinds.get(type(value), type(value).__name__)})"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
