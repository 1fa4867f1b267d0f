"""Ray Serve's own part of a config file: refuses what Serve does not take, and what it would silently ignore."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.files import read_document


def check_schema(path: str | Path) -> None:
    """Raises ValueError, one line a problem: `file: key: what is wrong`."""
    from ray.serve.schema import ServeDeploySchema

    document = read_document(path)
    try:
        problems = list(_ignored(document, ServeDeploySchema.model_validate(document)))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))


def _ignored(written: dict[str, Any], parsed: BaseModel, where: str = "") -> Iterator[str]:
    """A line for each key of the file, at any depth, that is no field of Serve's schema."""
    known = type(parsed).model_fields
    for key, value in written.items():
        if key not in known:
            yield f"{where}{key}: unknown key; known here: {', '.join(known)}"
            continue
        child = getattr(parsed, key)
        pairs = enumerate(zip(value, child, strict=False)) if isinstance(value, list) else [("", (value, child))]
        for index, (inner, model) in pairs:
            if isinstance(inner, dict) and isinstance(model, BaseModel):
                yield from _ignored(inner, model, f"{where}{key}.{index}." if index != "" else f"{where}{key}.")
