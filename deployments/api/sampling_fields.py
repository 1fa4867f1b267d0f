"""Sampling fields: how the next token is drawn, and when, from the request's fields to the engine's SamplingParams."""

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, FailFast, Field

from actors.words.messages import SamplingParams
from deployments.api.strict_body import Body, wrong

MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_ALLOWED_IDS = 4096
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_SALT_CHARS = 256
GREEDY_BELOW = 1e-5  # lower temperatures count as 0: dividing logits by them would overflow

_SEED_MASK = 2**63 - 1  # clients may send negative seeds; the engine's have 63 bits
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # whether it is in the vocabulary is checked in service.py
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]


def _ids_for_keys(value: object) -> object:
    """Parse the keys: JSON writes them as texts."""
    if not isinstance(value, dict):
        raise wrong("invalid_type", 'must be an object of token ids and numbers, as in {"17": -100}')
    if not all(isinstance(key, str) and _TOKEN_ID.fullmatch(key) for key in value):
        raise wrong("invalid_type", 'has a key that is no token id; keys are decimal numbers, as in {"17": -100}')
    return {int(key): bias for key, bias in value.items()}


class SamplingBody(Body):
    """The fields that become SamplingParams, where each has its meaning and order, and two of the engine's queue."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=2**31)  # 0 and -1: all
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_BIASES),
        BeforeValidator(_ids_for_keys),
    ] = Field(default_factory=dict)
    min_tokens: int = Field(default=0, ge=0)  # stop ids, end of sequence and stop strings do not count before
    stop_token_ids: Annotated[list[TokenId], FailFast(), Field(max_length=MAX_STOP_TOKEN_IDS)] = Field(
        default_factory=list
    )
    allowed_token_ids: Annotated[list[TokenId], FailFast(), Field(max_length=MAX_ALLOWED_IDS)] = Field(
        default_factory=list
    )
    bad_words: Annotated[list[BadWord], FailFast(), Field(max_length=MAX_BAD_WORDS)] = Field(default_factory=list)
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)  # the lowest begins first
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARS)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are shown beside each generated one; None: no log-probabilities at all."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return None

    def sampling(self, choice: int, vocab_size: int, bad_words: Sequence[list[int]] = ()) -> SamplingParams:
        """The parameters of the sequence that is this choice (from 0) of a prompt. `bad_words`: as token ids."""
        return SamplingParams(
            temperature=self.temperature if self.temperature >= GREEDY_BELOW else 0.0,
            seed=None if self.seed is None else choice_seed(self.seed, choice),
            top_p=self.top_p,
            top_k=self.top_k if 0 < self.top_k < vocab_size else 0,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            min_tokens=self.min_tokens,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            allowed_ids=sorted(set(self.allowed_token_ids)),
            bad_words=list(bad_words),
        )


def choice_seed(seed: int, choice: int) -> int:
    """The first choice has the request's own seed, the others 63 bits of the SHA-256 of "seed:choice".

    Not seed + choice: the second choice of seed 7 would equal the first of seed 8.
    """
    if choice == 0:
        return seed & _SEED_MASK
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & _SEED_MASK
