"""A tokenizer of 97 ids that can write JSON: single characters, some longer pieces, and an end-of-text token."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"
_PIECES = ['{"', '":', '",', '"}', "00", "ab", "abc", "tr", "tru", "true"]
_CHARACTERS = [char for char in map(chr, range(0x21, 0x7F)) if char not in "#$%&@^~`"]
END_ID = len(_CHARACTERS) + len(_PIECES)


def tiny_tokenizer() -> Tokenizer:
    """END is its last id; a model may have more, which mean nothing."""
    vocabulary = {token: index for index, token in enumerate([*_CHARACTERS, *_PIECES])}
    cuts = [(piece[:at], piece[at:]) for piece in _PIECES for at in range(1, len(piece))]
    merges = [cut for cut in cuts if set(cut) <= set(vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    assert tokenizer.token_to_id(END) == END_ID
    return tokenizer


def with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint's files in another folder, with the tokenizer, and END as what ends a text → that folder."""
    for path in checkpoint.iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).symlink_to(path)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END_ID}))
    return folder
