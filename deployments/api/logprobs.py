"""Log-probabilities as OpenAI's completions and chats show them."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from actors.words.messages import TokenLogprobs
from deployments.api.errors import ApiError
from deployments.text.token_text import TokenText, TokenTexts
from deployments.text.transcript import ScoredToken

MAX_PROMPT_ENTRIES = 2**19  # of all prompts and answers: some 30 MB of JSON, built in a few seconds
LOWEST = -9999.0  # for tokens of probability 0, as OpenAI has it: JSON has no infinities


class Names(Protocol):
    """What tokens are called; see TokenTexts."""

    def of(self, token_id: int) -> TokenText:
        """The text and bytes of one id."""


class NamedById:
    """Names that no two tokens share: token_id:17."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def of(self, token_id: int) -> TokenText:
        """See Names."""
        return TokenText(f"token_id:{token_id}", self._texts.of(token_id).raw)


class PromptToken(msgspec.Struct, frozen=True):
    """One of the tokens that a prompt could have at one place."""

    logprob: float
    rank: int | None  # 1: the likeliest; None where the prompt's own token is none of those shown
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]  # by token id, as vLLM has it; null for the first token


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """`logprobs` of a completion: lists with one entry a token."""

    text_offset: list[int]  # characters of the choice's text before the token
    token_logprobs: list[float | None]  # null for the first token of an echoed prompt
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]  # the likeliest tokens, and always the token itself


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at one position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(msgspec.Struct, frozen=True):
    """A token of a message, and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """`logprobs` of a chat."""

    content: list[ContentLogprob]


def completion_logprobs(tokens: Sequence[ScoredToken], texts: Names) -> CompletionLogprobs:
    """The `logprobs` of a completion, for these tokens."""
    return CompletionLogprobs(
        text_offset=[token.offset for token in tokens],
        token_logprobs=[_finite(token.logprobs.logprob) if token.logprobs else None for token in tokens],
        tokens=[texts.of(token.token_id).text for token in tokens],
        top_logprobs=[_by_text(token.token_id, token.logprobs, texts) for token in tokens],
    )


def chat_logprobs(tokens: Sequence[ScoredToken], texts: Names) -> ChatLogprobs:
    """The `logprobs` of a chat, for these tokens."""
    content = []
    for token in tokens:
        assert token.logprobs is not None, "only an echoed prompt begins with a token without one"
        shown = texts.of(token.token_id)
        top = [
            TopLogprob(texts.of(top_id).text, logprob, texts.of(top_id).raw) for top_id, logprob in _top(token.logprobs)
        ]
        content.append(ContentLogprob(shown.text, _finite(token.logprobs.logprob), shown.raw, top))
    return ChatLogprobs(content)


def prompt_logprobs(
    ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, texts: TokenTexts
) -> PromptLogprobs:
    """The `prompt_logprobs` of a prompt; `logprobs` are those of the second id and on."""
    shown: PromptLogprobs = [None]
    for token_id, of_token in zip(ids[1:], logprobs, strict=True):
        ranks = {top_id: rank for rank, top_id in enumerate(of_token.top_ids[:num_top], start=1)}
        values = {token_id: of_token.logprob} | dict(list(_top(of_token))[:num_top])
        shown.append(
            {str(one): PromptToken(_finite(value), ranks.get(one), texts.of(one).text) for one, value in values.items()}
        )
    return shown


def check_prompt_entries(num_tokens: int, num_top: int | None, num_answers: int) -> None:
    """Raises ApiError (400) where the log-probabilities of prompts of so many tokens would be too many to show."""
    if num_top is None:
        return
    if (num_entries := num_tokens * (num_top + 1) * num_answers) > MAX_PROMPT_ENTRIES:
        message = (
            f"prompt_logprobs: {num_tokens} tokens of the prompt, with {num_top + 1} entries each in {num_answers} "
            f"answers, are {num_entries} entries, and at most {MAX_PROMPT_ENTRIES} are shown; ask for fewer, for fewer "
            "answers, or without echo"
        )
        raise ApiError(400, message, param="prompt_logprobs")


def _by_text(token_id: int, logprobs: TokenLogprobs | None, texts: Names) -> dict[str, float] | None:
    if logprobs is None:
        return None
    by_text: dict[str, float] = {}
    for top_id, logprob in [*_top(logprobs), (token_id, _finite(logprobs.logprob))]:
        by_text.setdefault(texts.of(top_id).text, logprob)  # tokens may have the same text: the likeliest is kept
    return by_text


def _top(logprobs: TokenLogprobs) -> Iterator[tuple[int, float]]:
    return zip(logprobs.top_ids, map(_finite, logprobs.top_logprobs), strict=True)


def _finite(logprob: float) -> float:
    return max(LOWEST, logprob)
