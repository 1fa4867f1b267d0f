"""The request log: an id for every request, in each of its log lines, and one line of JSON when it has ended.

Texts of clients and keys are never in it.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACCESS = logging.getLogger("deployments.access")  # its messages are lines of JSON
PROBES = frozenset({"/health", "/ready", "/metrics", "/metrics/replica"})  # what Kubernetes and Prometheus ask
CLIENT_LEFT = 499  # what proxies call it; a status that nobody was sent
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestRecord(msgspec.Struct, omit_defaults=True):
    """What the line of one HTTP request says. Handlers fill it in while they answer; what is unset is left out."""

    request_id: str
    method: str
    path: str
    time: str = ""  # when it ended, UTC
    status: int = 0
    error: str | None = None  # OpenAI's code, or "client_left" where the client did not wait for the end
    key: str | None = None  # the name of the API key
    model: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # of those, found in the prefix cache
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    finish_reasons: list[str | None] | None = None  # one an answer; null: it was not finished
    ttft_s: float | None = None  # until its first token, as stagemesh_time_to_first_token_seconds counts
    total_s: float = 0.0  # from its arrival to its end


_current: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def current_request() -> RequestRecord | None:
    """The record of the HTTP request that is being answered here; None outside of one."""
    return _current.get()


def route_of(scope: Scope) -> str:
    """The path below the prefix that Serve gives the application."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def note_error(label: str) -> None:
    """Say in the line of the current request, if there is one, what went wrong."""
    if record := _current.get():
        record.error = label


def is_sane_id(request_id: str) -> bool:
    """Whether a client's x-request-id may stand in logs: 1 to 128 letters, digits and ._:/+=@- ."""
    return _SANE_ID.fullmatch(request_id) is not None


def new_sequence_id() -> str:
    """An id for the engine, unique also where clients use an id twice; it begins with that of the HTTP request."""
    record = _current.get()
    return uuid.uuid4().hex if record is None else f"{record.request_id}.{uuid.uuid4().hex[:16]}"


class RequestIdFilter(logging.Filter):
    """Gives every log record `request`: the id of the request that it belongs to in brackets, or nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets everything pass."""
        request = _current.get()
        record.request = "" if request is None else f"[{request.request_id}] "
        return True


class RequestLog:
    """The outermost ASGI middleware: opens a record for each request, counts it and writes its line."""

    def __init__(
        self, app: ASGIApp, access_log: Literal["requests", "all", "none"], count: Callable[[Scope, int], None]
    ) -> None:
        """`access_log`: which requests get a line, "requests" all but probes. `count` gets every scope and status."""
        self._app = app
        self._access_log = access_log
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; its record is the current one meanwhile."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        record = RequestRecord(_id_of(scope), scope["method"], route_of(scope))
        _current.set(record)
        is_complete = False

        async def watched(message: Message) -> None:
            nonlocal is_complete
            await send(message)
            if message["type"] == "http.response.start":
                record.status = message["status"]
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            record.status, is_complete = record.status or 500, True  # Starlette answers for us
            raise
        finally:
            if not is_complete:
                record.status, record.error = record.status or CLIENT_LEFT, record.error or "client_left"
            self._count(scope, record.status)
            if self._wants(record):
                _write(record, began)

    def _wants(self, record: RequestRecord) -> bool:
        return self._access_log == "all" or (self._access_log == "requests" and record.path not in PROBES)


def _write(record: RequestRecord, began: float) -> None:
    record.time = datetime.now(UTC).isoformat(timespec="milliseconds")
    record.total_s = round(time.monotonic() - began, 6)
    record.path = record.path[:256]
    ACCESS.info(msgspec.json.encode(record).decode())


def _id_of(scope: Scope) -> str:
    """The x-request-id of the request (Serve gives one to each that has none), where it is sane; else a new one."""
    for name, value in scope["headers"]:
        request_id: str = value.decode("latin-1")
        if name.lower() == b"x-request-id" and is_sane_id(request_id):
            return request_id
    return uuid.uuid4().hex
