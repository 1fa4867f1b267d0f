"""The service: what the routes need of a replica, and how a parsed body becomes requests of the engine."""

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

from actors.remote.engine import Engine
from actors.words.messages import Request, SamplingParams
from cluster.topology import Topology
from deployments.admission import Admission
from deployments.api_error import ApiError
from deployments.generation import Answer, Generation
from deployments.outbox import Outbox
from deployments.requests import GenerationBody
from deployments.text import Text

_SEED_MASK = 2**63 - 1  # clients may send negative seeds, the engine has 63 bits


@dataclass(frozen=True)
class Limits:
    """What this replica can take."""

    max_model_len: int  # tokens: prompt + generated; what one sequence can have in the KV cache at most
    vocab_size: int  # width of the logits: ids below it exist
    max_requests: int
    max_body_bytes: int


@dataclass(frozen=True)
class Identity:
    """What this replica says of itself."""

    model: str  # the served id
    replica: str
    version: str
    created: int  # seconds since 1970
    topology: Topology


class Service:
    """One replica behind its routes. Used in the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        text: Text,
        identity: Identity,
        limits: Limits,
        ranks: Callable[[], Sequence[object]],
    ) -> None:
        """The engine delivers to `outbox`; `ranks` gives an encodable object a rank, as `/cluster` shows them."""
        self.engine = engine
        self.identity = identity
        self.limits = limits
        self.ranks = ranks
        self.admission = Admission(limits.max_requests)
        self._outbox = outbox
        self._text = text

    @property
    def is_ready(self) -> bool:
        """Whether the gang serves."""
        return self.engine.snapshot().state == "ready"

    @asynccontextmanager
    async def generate(self, body: GenerationBody) -> AsyncIterator[Generation]:
        """Let a request in, start it, and when the block is left end what still runs and give its places back.

        Raises ApiError: 404 for another model, 400 for a prompt that cannot be served, 503 when full or not serving.
        """
        if body.model != self.identity.model:
            message = f"model: there is no such model here; this server has {self.identity.model}"
            raise ApiError(404, message, param="model", code="model_not_found")
        prompts = body.prompts
        with self.admission.reserve(len(prompts)):
            requests = [self._request(body, ids) for ids in await self._text.encode(prompts)]
            transcripts = [self._text.transcript(body.stop) for _ in requests]
            generation = Generation(self.engine, self._outbox, list(map(Answer, count(), requests, transcripts)))
            try:
                generation.start()
                yield generation
            finally:
                generation.end()

    def _request(self, body: GenerationBody, prompt_ids: list[int]) -> Request:
        self._check_ids(body.prompt_field, prompt_ids)
        return Request(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            max_tokens=self._max_tokens(body, len(prompt_ids)),
            sampling=SamplingParams(body.temperature, None if body.seed is None else body.seed & _SEED_MASK),
            stop_token_ids=frozenset() if body.ignore_eos else self._text.eos_token_ids,
        )

    def _check_ids(self, field: str, prompt_ids: list[int]) -> None:
        if not prompt_ids:
            raise ApiError(400, f"{field}: has no tokens; send at least one", param=field)
        if len(prompt_ids) >= self.limits.max_model_len:
            raise ApiError(
                400,
                f"{field}: {len(prompt_ids)} tokens, but the context has {self.limits.max_model_len} for prompt and "
                "answer together; shorten it",
                param=field,
                code="context_length_exceeded",
            )
        if min(prompt_ids) < 0 or max(prompt_ids) >= self.limits.vocab_size:
            raise ApiError(400, f"{field}: token ids must be from 0 to {self.limits.vocab_size - 1}", param=field)

    def _max_tokens(self, body: GenerationBody, num_prompt_tokens: int) -> int:
        rest = self.limits.max_model_len - num_prompt_tokens
        field, max_tokens = body.token_limit
        if max_tokens is None:
            return min(rest, body.default_max_tokens or rest)
        if max_tokens > rest:
            raise ApiError(
                400,
                f"{field}: {max_tokens} and a prompt of {num_prompt_tokens} tokens are more than the context of "
                f"{self.limits.max_model_len}; send at most {rest}",
                param=field,
                code="context_length_exceeded",
            )
        return max_tokens
