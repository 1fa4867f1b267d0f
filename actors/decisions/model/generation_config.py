"""The file generation_config.json: how a checkpoint is meant to be sampled, and which ids end an answer."""

import json
from pathlib import Path
from typing import Any

GENERATION_CONFIG = "generation_config.json"


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Its keys, but for those that are null; none where the checkpoint has no such file.

    Raises ValueError, with the remedy, when the file holds no JSON object.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON object ({error}); get it again from the checkpoint's source") from None
    return {key: value for key, value in found.items() if value is not None}


def eos_token_ids(folder: Path) -> frozenset[int]:
    """Ids that end an answer, from generation_config.json (chat models list several) or config.json.

    Where config.json has them in its text part only, those; so does Transformers. Raises ValueError for what is no id.
    """
    config = json.loads(path.read_bytes()) if (path := folder / "config.json").is_file() else {}
    for name, keys in (
        (GENERATION_CONFIG, read_generation_config(folder)),
        ("config.json", config),
        ("config.json", config.get("text_config") or {}),
    ):
        value = keys.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(id_) is int for id_ in ids):
                raise ValueError(f"{folder / name}: eos_token_id: must be a token id or a list of them; correct it")
            return frozenset(ids)
    return frozenset()
