"""The routes: a Starlette app over a Service. Every error is an OpenAI error object; no timer delays a token."""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from deployments.api.aside import LARGE_BYTES, LARGE_TOKENS, aside
from deployments.api.bodies import ChatBody, CompletionBody, GenerationBody
from deployments.api.connection import ClientGoneError, Connection, read_body, warning
from deployments.api.door import Door
from deployments.api.errors import ApiError, Headers, internal_error, log_unexpected, shown
from deployments.api.generation import Generation, draining, not_ready
from deployments.api.key_limits import LIMIT_HEADERS, KeyAccount
from deployments.api.key_ring import KeyRing
from deployments.api.metrics import CONTENT_TYPE
from deployments.api.request_log import RequestLog, current_request, note_error
from deployments.api.responses import DONE, Reply, reply_to
from deployments.api.service import Service
from deployments.api.strict_body import parse_body
from deployments.api.token_pages import TokenPages

logger = logging.getLogger(__name__)

JSON_HEADERS: Headers = [(b"content-type", b"application/json")]
STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back
]
PING = b": ping\n\n"  # a comment of server-sent events: clients skip it, and see that the connection lives


def build_app(
    service: Service,
    ring: KeyRing | None = None,
    cors_origins: Sequence[str] = (),
    metrics_of_all: Callable[[], Awaitable[bytes]] | None = None,
) -> Starlette:
    """The ASGI app of one replica. `ring`: the API keys, where there are any; `cors_origins`: of web pages.

    `metrics_of_all`: the page of all replicas; None: there is no other.
    """
    pages, token_pages = Pages(service, metrics_of_all), TokenPages(service)
    routes = [
        Route("/v1/models", pages.models),
        Route("/v1/models/{model:path}", pages.model),
        Route("/v1/completions", GenerationRoute(service, CompletionBody), methods=["POST"]),
        Route("/v1/chat/completions", GenerationRoute(service, ChatBody), methods=["POST"]),
        Route("/tokenize", token_pages.tokenize, methods=["POST"]),
        Route("/detokenize", token_pages.detokenize, methods=["POST"]),
        Route("/tokenizer_info", token_pages.info),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/version", pages.version),
        Route("/cluster", pages.cluster),
        Route("/metrics", pages.metrics),
        Route("/metrics/replica", pages.own_metrics),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _internal_error},
        middleware=[
            Middleware(RequestLog, service.access_log, _counter(service, routes)),
            *_cors(cors_origins),
            Middleware(Door, ring, service.accounts),
        ],
    )
    app.router.redirect_slashes = False  # a redirect would be no OpenAI object
    app.state.service = service
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Before the door: browsers ask without a key whether a page may call at all, and read errors only so."""
    if not origins:
        return []
    shown = ["x-request-id", "retry-after", "warning", *(name.decode() for name in LIMIT_HEADERS)]
    methods = ("GET", "POST")
    return [Middleware(CORSMiddleware, origins, methods, allow_headers=("*",), expose_headers=shown, max_age=3600)]


class GenerationRoute:
    """The route of completions or chats: an ASGI app, so that the life of a request is one block of code."""

    def __init__(self, service: Service, kind: type[GenerationBody]) -> None:
        self._service = service
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. However it ends, its sequences end in the engine and its admission is released."""
        connection, arrived = Connection(receive, send), time.monotonic()
        try:
            account = scope["state"]["account"]
            self._service.admission.check_room(account.name)
            limits, ignored = self._service.limits, self._service.limits.noting_ignored()
            raw = await read_body(Request(scope, receive), limits.max_body_bytes, limits.body_too_long)
            body = await aside(len(raw) > LARGE_BYTES, parse_body, raw, self._kind, ignored)
            connection.more_headers += warning(ignored or [])
            if record := current_request():
                record.model = shown(body.model)
            deadline = self._service.deadline(body, arrived)
            await connection.run(self._answer(body, connection, deadline, account), deadline)
        except (ClientGoneError, ClientDisconnect):
            pass
        except ApiError as error:
            await connection.fail(error)
        except Exception as error:  # noqa: BLE001 - a fault in one request ends that request only
            log_unexpected(error)
            await connection.fail(internal_error())

    async def _answer(self, body: GenerationBody, connection: Connection, deadline: float, account: KeyAccount) -> None:
        reply = reply_to(body, self._service.text.token_texts)
        async with self._service.generate(body, deadline, account) as generation:
            if body.stream:
                await _stream(generation, reply, connection, body)
            else:
                await _respond(generation, reply, connection)


async def _stream(generation: Generation, reply: Reply, connection: Connection, body: GenerationBody) -> None:
    """Send each piece as soon as it is there. The response starts with the first piece: an error before has a status.

    While the gang recovers it starts earlier, with a ping, and an error after that is an event, as in any stream that
    has begun. Without pings proxies would take the silence for a dead server, and answer with a status of their own.
    """
    has_opened, is_last = False, False
    while not is_last:
        pieces = await generation.take()
        if not connection.has_started:
            await connection.start(200, STREAM_HEADERS)
        if not pieces:
            await connection.write(PING)
            continue
        if body.usage_in_chunks:
            reply.note(generation.usage)
        opened = () if has_opened else range(generation.num_answers)
        chunk = b"".join([reply.opening(index, pieces[0].prompt) for index in opened] + [*map(reply.chunk, pieces)])
        has_opened = True
        is_last = generation.is_finished
        if is_last:
            chunk += (reply.usage_chunk(generation.usage) if body.include_usage else b"") + DONE
        await connection.write(chunk, is_last=is_last)


async def _respond(generation: Generation, reply: Reply, connection: Connection) -> None:
    """Collect all pieces, then send one body."""
    answers = await generation.whole()
    usage = generation.usage
    whole = await aside(usage.total_tokens > LARGE_TOKENS, reply.whole, answers, usage)
    await connection.start(200, JSON_HEADERS)
    await connection.write(whole, is_last=True)


class Pages:
    """The routes that only read the replica's state."""

    def __init__(self, service: Service, metrics_of_all: Callable[[], Awaitable[bytes]] | None) -> None:
        self._service = service
        self._metrics_of_all = metrics_of_all

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._service.check_model(request.path_params["model"])
        return _json(self._card())

    async def health(self, request: Request) -> Response:
        """GET /health: the process lives."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: the gang serves, or 503."""
        if self._service.is_draining:
            raise draining()
        if not self._service.is_ready:
            raise not_ready()
        return _json({"status": "ready"})

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return _json({"version": self._service.identity.version})

    async def cluster(self, request: Request) -> Response:
        """GET /cluster: the replica's ranks, blocks and requests."""
        identity, engine = self._service.identity, self._service.engine.snapshot()
        topology = identity.topology
        return _json(
            {
                "model": identity.model,
                "replica": identity.replica,
                "state": self._service.state,
                "epoch": engine.epoch,
                "topology": {
                    "tensor_parallel_size": topology.tensor_parallel_size,
                    "pipeline_parallel_size": topology.pipeline_parallel_size,
                },
                "max_model_len": self._service.limits.max_model_len,
                "ranks": self._service.ranks(),
                "kv_blocks": {
                    "total": engine.blocks_total,
                    "used": engine.blocks_used,
                    "cached": engine.blocks_cached,
                },
                "requests": {"running": engine.running, "waiting": engine.waiting},
                "graphs": {
                    "shapes": engine.graphs.num_shapes,
                    "captured": engine.graphs.num_captured,
                    "failed": [
                        {**msgspec.structs.asdict(bucket), "reason": reason}
                        for bucket, reason in engine.graphs.failed.items()
                    ],
                },
            }
        )

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: of all replicas, whichever of them is reached."""
        if self._metrics_of_all is None:
            return await self.own_metrics(request)
        return Response(await self._metrics_of_all(), media_type=CONTENT_TYPE)

    async def own_metrics(self, request: Request) -> Response:
        """GET /metrics/replica: of this replica alone."""
        return Response(self._service.metrics.page(), media_type=CONTENT_TYPE)

    def _card(self) -> dict[str, object]:
        identity = self._service.identity
        return {
            "id": identity.model,
            "object": "model",
            "created": identity.created,
            "owned_by": "stagemesh",
            "max_model_len": self._service.limits.max_model_len,
            "sampling_defaults": self._service.defaults.in_force(),
        }


def _counter(service: Service, routes: Sequence[Route]) -> Callable[[Scope, int], None]:
    """Counts requests for the metrics, by the route's path as it is declared, also where the door has answered."""
    num_answered = service.latencies.num_answered

    def count(scope: Scope, status: int) -> None:
        route = scope.get("route") or next((one for one in routes if one.matches(scope)[0] != Match.NONE), None)
        num_answered[route.path if route else "none", status] += 1

    return count


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error_response(error: ApiError, more_headers: dict[str, str] | None = None) -> Response:
    note_error(error.label)
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers={**headers, **(more_headers or {})})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors that Starlette raises: no such route, or another method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    words = {404: "there is no such route", 405: f"this route takes {headers.get('Allow', 'other methods')}"}
    return _error_response(ApiError(error.status_code, words.get(error.status_code, error.detail)), headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    log_unexpected(error)
    return _error_response(internal_error())
