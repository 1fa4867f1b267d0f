"""The prompts of a verification: random ids of several lengths, or the lines of a file; and what they leave out."""

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.decisions.model.plan import Plan
from deployments.text.tokenizer import Text

_SEED = 0
_SHORT = (17, 5, 1)  # tokens
_LONG = 64  # the longest has at least so many
_BEYOND = 9  # tokens by which it is longer than windows and chunks reach
_MOST_TOKENS = 16_384  # of the longest: attention written out takes memory by its square
_MOST_BYTES = 4 << 30  # of what enters the layers, which is kept of every token


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, and what none of them exercises."""

    ids: tuple[tuple[int, ...], ...]
    not_exercised: tuple[str, ...]


def default_prompts(plan: Plan, num_new: int) -> Prompts:
    """Always the same random ids: one prompt longer than all blocks, windows and chunks, one that begins like it."""
    spec, block = plan.spec, plan.block_size
    reaches = {one.mask_spec.window or one.mask_spec.chunk or 0 for one in spec.attentions}
    bytes_per_token = spec.hidden_size * spec.num_layers * spec.dtype_bytes
    most = min(plan.max_model_len - num_new, _MOST_TOKENS, _MOST_BYTES // bytes_per_token)
    longest = min(most, max(_LONG, 3 * block + 5, max(reaches, default=0) + _BEYOND))
    lengths = [longest] + [length for length in (block + 3, *_SHORT) if length < longest]
    numbers = random.Random(_SEED)  # noqa: S311 - prompts, no secrets
    prompts = [tuple(numbers.choices(range(spec.vocab_size), k=length)) for length in lengths]
    shared = 2 * block
    if shared + 1 < longest:
        prompts.insert(1, (*prompts[0][:shared], *numbers.choices(range(spec.vocab_size), k=min(5, longest - shared))))
    return Prompts(tuple(prompts), _left_out(plan, longest))


def read_prompts(path: Path, folder: Path, plan: Plan, num_new: int) -> Prompts:
    """The prompts of a file: one text a line, or JSON lines with a `prompt` (text or ids). Raises ValueError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: {path} cannot be read ({error})") from None
    given = [_prompt(line, f"--prompts: {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not given:
        raise ValueError(f"--prompts: {path} holds no prompt; write one a line")
    text = Text.load(folder)
    try:
        encoded = asyncio.run(text.encode(given))
    finally:
        text.close()
    for number, ids in enumerate(encoded, 1):
        if not 1 <= len(ids) <= plan.max_model_len - num_new:
            raise ValueError(
                f"--prompts: {path}, prompt {number} has {len(ids)} tokens; with {num_new} more, 1 to "
                f"{plan.max_model_len - num_new} fit into model.max_model_len"
            )
        if wrong := [one for one in ids if not 0 <= one < plan.spec.vocab_size]:
            raise ValueError(f"--prompts: {path}, prompt {number}: {wrong[0]} is no id of {plan.spec.vocab_size}")
    return Prompts(tuple(map(tuple, encoded)), _left_out(plan, max(map(len, encoded))))


def _prompt(line: str, where: str) -> Any:
    if not line.lstrip().startswith("{"):
        return line
    try:
        prompt = json.loads(line).get("prompt")
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}); begin texts otherwise than with a brace") from None
    is_ids = isinstance(prompt, list) and all(type(one) is int for one in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise ValueError(f"{where}: `prompt` must be a text or a list of token ids")
    return prompt


def _left_out(plan: Plan, longest: int) -> tuple[str, ...]:
    """Windows and chunks that no prompt fills."""
    found = {
        f"the {kind} of {reach} tokens that some layers have: the longest prompt has {longest}"
        for one in plan.spec.attentions
        for kind, reach in (("window", one.mask_spec.window), ("chunk", one.mask_spec.chunk))
        if reach is not None and reach >= longest
    }
    return tuple(sorted(found))
