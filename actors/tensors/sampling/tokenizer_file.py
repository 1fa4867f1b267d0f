"""Reads the tokenizer of a checkpoint's folder as the vocabulary that grammars are compiled for."""

import json
from pathlib import Path

from llguidance import LLTokenizer

from actors.decisions.grammar import make_vocabulary
from actors.decisions.model.generation_config import eos_token_ids

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def read_vocabulary(folder: Path, vocab_size: int) -> LLTokenizer:
    """The vocabulary of the model in a folder. Raises OSError or ValueError where no tokenizer can be read."""
    return make_vocabulary(_tokenizer_json(folder), vocab_size, sorted(eos_token_ids(folder)))


def _tokenizer_json(folder: Path) -> str:
    """The tokenizer as tokenizer.json has it; from another format, or where tokens are missing there, by Transformers.

    Transformers takes about a second more.
    """
    path = folder / _TOKENIZER
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if _added_elsewhere(folder) <= {str(token["id"]) for token in json.loads(text).get("added_tokens", [])}:
            return text
    from transformers import AutoTokenizer  # takes time, and is nearly never needed here

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{folder}: its tokenizer has no fast form; grammars need one: add a {_TOKENIZER}")
    return str(tokenizer.backend_tokenizer.to_str())


def _added_elsewhere(folder: Path) -> set[str]:
    path = folder / _TOKENIZER_CONFIG
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    return set(config.get("added_tokens_decoder", {}))
