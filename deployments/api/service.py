"""The service: what the routes need of a replica, and how a parsed body becomes requests to the engine."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec

from actors.remote.engine import Engine
from actors.remote.meeting import RankInfo
from actors.words.messages import Request
from cluster.topology import Topology
from configs.config import AdmissionConfig
from configs.monitoring import MonitoringConfig
from deployments.api.admission import Admission
from deployments.api.answer import Answer, Echo
from deployments.api.bodies import GenerationBody
from deployments.api.context_length import body_too_long, conversation_too_long, too_long, truncated
from deployments.api.errors import ApiError
from deployments.api.generation import Generation, draining, too_late
from deployments.api.grammar import check_contradictions, check_size, grammar_of
from deployments.api.key_limits import KeyAccount, KeyAccounts
from deployments.api.logprobs import check_prompt_entries
from deployments.api.metrics import Labels, Latencies, Metrics, Stopwatch
from deployments.api.outbox import Outbox
from deployments.api.request_log import current_request, new_sequence_id
from deployments.api.sampling_defaults import SamplingDefaults
from deployments.text.prompts import Conversation, ConversationError, Prompt
from deployments.text.tokenizer import Text


@dataclass(frozen=True)
class Limits:
    """The largest requests that this replica takes."""

    max_model_len: int  # tokens: prompt + generated; what one sequence can have in the KV cache at most
    vocab_size: int  # width of the logits: ids below it exist
    admission: AdmissionConfig
    request_s: float  # from a request's arrival to the end of its answer
    unknown_fields: Literal["ignore", "refuse"] = "ignore"

    @property
    def max_body_bytes(self) -> int:
        """Of one request."""
        return self.admission.body_bytes(self.max_model_len)

    def noting_ignored(self) -> list[str] | None:
        """A list for the names of unknown fields; None where they are refused."""
        return [] if self.unknown_fields == "ignore" else None

    def body_too_long(self, max_bytes: int) -> ApiError:
        """413, in the words of a context that is too short."""
        return body_too_long(self.max_model_len, max_bytes)


@dataclass(frozen=True)
class Identity:
    """What this replica tells clients about itself."""

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
        ranks: Callable[[], Sequence[RankInfo]],
        defaults: SamplingDefaults = SamplingDefaults(),
        monitoring: MonitoringConfig = MonitoringConfig(),
        num_spares: Callable[[], Sequence[int]] = list,
    ) -> None:
        """The engine delivers to `outbox`; `ranks` gives what `/cluster` shows of each.

        `defaults`: what the checkpoint sets for fields that requests leave out. `num_spares`: processes of each stage
        that can take a rank over.
        """
        self.engine = engine
        self.identity = identity
        self.limits = limits
        self.ranks = ranks
        self.defaults = defaults
        self.admission = Admission(limits.admission)
        self.text = text
        self.accounts = KeyAccounts()
        self.is_draining = False  # new requests are refused, running ones finish; may be set from any thread
        self._outbox = outbox
        self.access_log = monitoring.access_log
        self.latencies = Latencies()
        labels = Labels(identity.model, identity.replica, identity.version)
        aliases = monitoring.metric_aliases
        self.metrics = Metrics(
            engine, self.latencies, labels, ranks, self.accounts, lambda: self.state, num_spares, aliases
        )

    @property
    def state(self) -> str:
        """The engine's state, or "draining"."""
        return "draining" if self.is_draining else self.engine.state

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken and served at once."""
        return self.engine.state == "ready" and not self.is_draining

    @asynccontextmanager
    async def generate(self, body: GenerationBody, deadline: float, account: KeyAccount) -> AsyncIterator[Generation]:
        """Admit a request and start it; when the block is left, end what still runs and release the admission.

        Raises ApiError: 404 for another model, 400 for a prompt that cannot be served, 503 when full or not serving,
        504 when the deadline passes before it has started.
        """
        if self.is_draining:
            raise draining()
        self.check_body(body)
        with self.admission.reserve(body.num_prompts * body.n, account.name) as note_served:
            generation = await self.prepare(body, deadline)
            num_prompt_tokens = generation.usage.prompt_tokens
            try:
                with self.admission.wait(num_prompt_tokens) as waiting:
                    account.spend(num_prompt_tokens)
                    generation.start(key=account.name, on_first=waiting.end)
                    note_served()
                    yield generation
            finally:
                generation.end()
                account.spend(generation.usage.completion_tokens)
                if record := current_request():
                    generation.tell(record)

    async def prepare(self, body: GenerationBody, deadline: float | None) -> Generation:
        """What a checked body asks for, in token ids; nothing has started. Raises ApiError as `generate` does."""
        began = time.monotonic()
        body = self.defaults.fill(body)
        prompts = body.prompts
        self._check_tools(prompts)
        bad_words = await self._bad_words(body, deadline)
        answers: list[Answer] = []
        num_prompt_tokens = num_grammar_chars = 0
        encoded = await self.encode(prompts, body.adds_special_tokens, deadline)
        for prompt, all_ids in zip(prompts, encoded, strict=True):
            await asyncio.sleep(0)  # many long prompts take milliseconds: others may go between them
            prompt_ids = truncated(body, all_ids, self.limits.max_model_len)
            self._check_prompt(body, prompt_ids)
            num_prompt_tokens += len(prompt_ids)
            check_prompt_entries(num_prompt_tokens, body.num_prompt_logprobs, body.n)
            grammar = await grammar_of(body, prompt, prompt_ids, self.text, deadline)
            num_grammar_chars += len(grammar or "") * body.n
            check_size(num_grammar_chars, body.n)
            shown = prompt_ids if isinstance(prompt, str) and len(prompt_ids) < len(all_ids) else prompt
            for choice in range(body.n):
                request = self._request(body, prompt_ids, choice, bad_words, grammar, deadline)
                answers.append(self._answer(body, shown, request, len(answers), began))
        return Generation(self.engine, self._outbox, answers, num_prompt_tokens, deadline)

    def check_body(self, body: GenerationBody) -> None:
        """Raises ApiError: 404 for another model, 400 for ids that the model does not have."""
        self.check_model(body.model)
        self.check_ids("logit_bias", list(body.logit_bias))
        self.check_ids("stop_token_ids", body.stop_token_ids)
        self.check_ids("allowed_token_ids", body.allowed_token_ids)

    def check_model(self, model: str) -> None:
        """Raises ApiError (404) when another model is asked for than the one served."""
        if model != self.identity.model:
            message = f"model: there is no such model here; this server has {self.identity.model}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def deadline(self, body: GenerationBody, arrived: float) -> float:
        """When a request that arrived at `arrived` must have ended, in monotonic seconds. Raises ApiError (400)."""
        limit_s = self.limits.request_s
        if body.timeout is not None and body.timeout > limit_s:
            message = f"timeout: {body.timeout:g} s is more than this server gives; send at most {limit_s:g}"
            raise ApiError(400, message, param="timeout")
        return arrived + (limit_s if body.timeout is None else body.timeout)

    async def encode(
        self, prompts: list[Prompt], add_special_tokens: bool = True, deadline: float | None = None
    ) -> list[list[int]]:
        """Token ids of prompts. Raises ApiError: 400 for a conversation without a text, 504 at the deadline."""
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                return await self.text.encode(prompts, add_special_tokens)
        except ConversationError as error:
            if error.is_too_long:
                raise conversation_too_long(self.limits.max_model_len, str(error), error.field) from None
            raise ApiError(400, str(error), param=error.field) from None
        except TimeoutError:
            raise too_late() from None

    async def _bad_words(self, body: GenerationBody, deadline: float | None) -> list[list[int]]:
        """The ids of bad words, as they are at the beginning of a text and behind a space."""
        words = [space + word.lstrip(" ") for word in body.bad_words for space in ("", " ")]
        encoded = await self.encode(list(words), add_special_tokens=False, deadline=deadline) if words else []
        return [list(ids) for ids in dict.fromkeys(map(tuple, encoded)) if ids]

    def _request(
        self,
        body: GenerationBody,
        prompt_ids: list[int],
        choice: int,
        bad_words: list[list[int]],
        grammar: str | None,
        deadline: float | None,
    ) -> Request:
        eos_ids = frozenset() if body.ignore_eos else self.text.eos_token_ids
        stop_ids = eos_ids.union(body.stop_token_ids)
        if body.min_tokens and body.allowed_token_ids and stop_ids.issuperset(body.allowed_token_ids):
            message = "min_tokens: all of allowed_token_ids end the answer; allow others too, or leave it out"
            raise ApiError(400, message, param="min_tokens")
        request = Request(
            request_id=new_sequence_id(),
            prompt_ids=prompt_ids,
            max_tokens=self._max_tokens(body, len(prompt_ids)),
            sampling=msgspec.structs.replace(body.sampling(choice, self.limits.vocab_size, bad_words), grammar=grammar),
            stop_token_ids=stop_ids,
            deadline=deadline,
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
        check_contradictions(request)
        return request

    def _answer(self, body: GenerationBody, prompt: Prompt, request: Request, index: int, began: float) -> Answer:
        transcript = self.text.transcript(
            body.stop, body.min_tokens, not body.skip_special_tokens, body.include_stop_str_in_output
        )
        echo = Echo(prompt if isinstance(prompt, str) else None, body.num_logprobs) if body.echoes else None
        if body.continues_prompt and not body.echoes:
            transcript.follow(request.prompt_ids)
        reader = self.text.reader(prompt, request.prompt_ids, index) if isinstance(prompt, Conversation) else None
        tells_prompt = body.return_token_ids or body.prompt_logprobs is not None
        stopwatch = Stopwatch(self.latencies, began)
        return Answer(
            index, request, transcript, stopwatch, echo, reader, body.lead, body.return_token_ids, tells_prompt
        )

    def _check_tools(self, prompts: list[Prompt]) -> None:
        uses_tools = any(isinstance(prompt, Conversation) and prompt.tools for prompt in prompts)
        if uses_tools and not self.text.can_call_tools:
            message = (
                "tools: it is not known how this model writes tool calls; leave them out, or have the server's config "
                "say it in model.tool_format"
            )
            raise ApiError(400, message, param="tools", code="unsupported_parameter")

    def _check_prompt(self, body: GenerationBody, prompt_ids: list[int]) -> None:
        field = body.prompt_field
        if not prompt_ids:
            raise ApiError(400, f"{field}: has no tokens; send at least one", param=field)
        asked = body.token_limit[1]
        if len(prompt_ids) + (asked != 0) > self.limits.max_model_len:
            num_asked = 1 if asked is None else asked
            raise too_long(self.limits.max_model_len, len(prompt_ids), num_asked, field, field)
        self.check_ids(field, prompt_ids)

    def check_ids(self, field: str, token_ids: list[int]) -> None:
        """Raises ApiError (400) for ids that the model does not have."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.limits.vocab_size):
            raise ApiError(400, f"{field}: token ids must be from 0 to {self.limits.vocab_size - 1}", param=field)

    def _max_tokens(self, body: GenerationBody, num_prompt_tokens: int) -> int:
        rest = self.limits.max_model_len - num_prompt_tokens
        field, max_tokens = body.token_limit
        if max_tokens is None:
            max_tokens = min(rest, self.defaults.max_tokens or body.default_max_tokens or rest)
        if max_tokens > rest:
            raise too_long(self.limits.max_model_len, num_prompt_tokens, max_tokens, body.prompt_field, field)
        if body.min_tokens > max_tokens:
            raise ApiError(
                400,
                f"min_tokens: {body.min_tokens} is more than {field} allows, which is {max_tokens}; "
                f"send at most that many, or a larger {field}",
                param="min_tokens",
            )
        return max_tokens
