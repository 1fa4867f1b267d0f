"""The tokenizer's routes: texts and conversations as the model's token ids, ids as text, and what the tokenizer is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Self

import msgspec
from pydantic import FailFast, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from deployments.api.aside import LARGE_BYTES, LARGE_TOKENS, aside
from deployments.api.connection import read_body, warning
from deployments.api.errors import Headers, server_full
from deployments.api.generation import too_late
from deployments.api.prompt_fields import Messages
from deployments.api.sampling_fields import TokenId
from deployments.api.service import Service
from deployments.api.strict_body import AnyBody, Body, parse_body, wrong
from deployments.api.template_fields import TemplateBody
from deployments.text.prompts import Prompt

MAX_AT_ONCE = 64  # requests that wait for the tokenizer here, or have it


class TokenizeBody(TemplateBody):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages = Field(default_factory=list)
    add_special_tokens: bool | None = None  # for a prompt, true by default; a template writes its own
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise wrong("invalid_value", "send either prompt or messages", field="prompt")
        if self.messages and self.add_special_tokens:
            raise wrong("invalid_value", "is for prompt only; leave it out", field="add_special_tokens")
        for name, field in TemplateBody.model_fields.items() if self.prompt is not None else ():
            if getattr(self, name) != field.get_default(call_default_factory=True):
                raise wrong("invalid_value", "is for messages only; leave it out", field=name)
        return self

    @property
    def text_or_messages(self) -> Prompt:
        """What is to be tokenized."""
        if self.prompt is not None:
            return self.prompt
        return self.conversation_of(self.messages)


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FailFast()]


class Tokens(msgspec.Struct, frozen=True):
    """The answer to /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | msgspec.UnsetType = msgspec.UNSET


class TokenPages:
    """The routes of the tokenizer. They need no engine, and so also answer while the gang does not serve."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._num_waiting = 0
        self._turn = asyncio.Lock()  # one at a time, so that prompts of completions wait behind one of them at most

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the ids that a completion or a chat would start from."""
        body, headers = await self._read(request, TokenizeBody)
        self._service.check_model(body.model or self._service.identity.model)
        async with self._tokenizer():
            (ids,) = await self._service.encode([body.text_or_messages], body.add_special_tokens is not False)
        max_model_len, is_large = self._service.limits.max_model_len, len(ids) > LARGE_TOKENS
        name = self._service.text.names
        names = await aside(is_large, name, ids) if body.return_token_strs else msgspec.UNSET
        return await aside(is_large, _json, Tokens(ids, len(ids), max_model_len, names), headers)

    async def info(self, request: Request) -> Response:
        """GET /tokenizer_info."""
        return _json({**self._service.text.info(), "max_model_len": self._service.limits.max_model_len}, [])

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of ids, special tokens included."""
        body, headers = await self._read(request, DetokenizeBody)
        self._service.check_model(body.model or self._service.identity.model)
        self._service.check_ids("tokens", body.tokens)
        async with self._tokenizer():
            return _json({"prompt": await self._service.text.decode(body.tokens)}, headers)

    @asynccontextmanager
    async def _tokenizer(self) -> AsyncIterator[None]:
        """Have the tokenizer while the block runs. Raises ApiError: 503 where too many wait, 504 after request_s."""
        if self._num_waiting >= MAX_AT_ONCE:
            raise server_full(f"{MAX_AT_ONCE} requests wait for the tokenizer")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._service.limits.request_s), self._turn:
                yield
        except TimeoutError:
            raise too_late() from None
        finally:
            self._num_waiting -= 1

    async def _read(self, request: Request, kind: type[AnyBody]) -> tuple[AnyBody, Headers]:
        """The body, and headers of the answer."""
        ignored = self._service.limits.noting_ignored()
        raw = await read_body(request, self._service.limits.max_body_bytes)
        body = await aside(len(raw) > LARGE_BYTES, parse_body, raw, kind, ignored)
        return body, warning(ignored or [])


def _json(value: object, headers: Headers) -> Response:
    response = Response(msgspec.json.encode(value), media_type="application/json")
    response.raw_headers += headers
    return response
