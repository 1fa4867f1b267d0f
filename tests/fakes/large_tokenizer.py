"""A byte-level tokenizer of 128,002 ids: invented words of Latin letters, all bytes, and an end-of-text token."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUM_WORDS = 128_000
END_ID, CALL_ID = NUM_WORDS, NUM_WORDS + 1


def large_tokenizer() -> Tokenizer:
    """Each word is a shorter one and a letter or sign more; it takes about a second to make."""
    chance = random.Random(0)
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    words, merges = {sign: index for index, sign in enumerate(signs)}, []
    shorter = list(signs)
    while len(words) < NUM_WORDS:
        begin, end = chance.choice(shorter), chance.choice(letters if chance.random() < 0.9 else signs)
        if begin + end not in words and len(begin) < 10:
            words[begin + end] = len(words)
            merges.append((begin, end))
            shorter.append(begin + end)
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|call|>", special=True)])
    return tokenizer


def save_large_tokenizer(folder: Path) -> Tokenizer:
    """Write it into a checkpoint's folder, with what ends a text."""
    tokenizer = large_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END_ID}))
    return tokenizer
