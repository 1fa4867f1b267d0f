"""Connection: one HTTP exchange; what was sent so far, and whether the client is still there."""

import asyncio
import time
from collections.abc import Callable, Coroutine

from starlette.requests import Request
from starlette.types import Receive, Send

from deployments.api.errors import ApiError, Headers
from deployments.api.request_log import note_error

BODY_S = 30.0  # from a request's arrival to the last byte of its body
GRACE_S = 5.0  # after a request's deadline, for a client to read the error; then the connection is given up


# httptools, by which Serve's own proxy reads HTTP, ends a request where another protocol is to begin.
LOST_BODY = (
    "the body was lost, as the request asks to upgrade the connection and this server's proxy stops reading there; "
    "send it without the header Upgrade (Java: HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1)), "
    "or have the server run behind HAProxy"
)


class ClientGoneError(Exception):
    """The client has closed the connection, so nothing can be sent. Handled in deployments/api/routes.py."""


class Connection:
    """The ASGI channel of a request whose body has been read."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.has_started = False
        self.more_headers: Headers = []  # of every response

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers. Raises ClientGoneError."""
        self.has_started = True
        headers = [*headers, *self.more_headers]
        await self._emit({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, is_last: bool = False) -> None:
        """Send a part of the body at once; waits while the client reads slowly. Raises ClientGoneError."""
        await self._emit({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def fail(self, error: ApiError) -> None:
        """Send an error: as the response, or as the last event of a stream that has begun (without `[DONE]`)."""
        note_error(error.label)
        try:
            if self.has_started:
                await self.write(b"data: " + error.body() + b"\n\n", is_last=True)
            else:
                await self.start(error.status, error.headers())
                await self.write(error.body(), is_last=True)
        except ClientGoneError:
            pass

    async def run(self, work: Coroutine[None, None, None], deadline: float) -> None:
        """Run `work`, which has to end by `deadline` (monotonic seconds), and cancel it when the client leaves.

        Returns when the work has cleaned up.
        """
        task = asyncio.ensure_future(work)
        departure = asyncio.ensure_future(self._departure())
        try:
            left_s = deadline + GRACE_S - time.monotonic()
            await asyncio.wait({task, departure}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in (task, departure):
                future.cancel()
            await asyncio.gather(task, departure, return_exceptions=True)
        if not task.cancelled():
            task.result()

    async def _departure(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _emit(self, message: dict[str, object]) -> None:
        try:
            await self._send(message)
        except Exception as error:  # each server has its own way to say that the connection is closed
            raise ClientGoneError from error


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes; send less, or raise admission.max_body_bytes")


def warning(ignored: list[str]) -> Headers:
    """A header that names fields which were ignored; none where there are none."""
    if not ignored:
        return []
    return [(b"warning", f'299 - "ignored unknown fields: {", ".join(ignored)}"'.encode())]


async def read_body(request: Request, max_bytes: int, too_large: Callable[[int], ApiError] = _too_large) -> bytes:
    """The raw body. Raises ApiError (415: no JSON, 413: above the limit, 408: too slow) and ClientDisconnect."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON; send the header Content-Type: application/json")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large(max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body was not complete after {BODY_S:g} s; send it faster") from None
    if not body and "upgrade" in request.headers and (announced != "0" or "transfer-encoding" in request.headers):
        raise ApiError(400, LOST_BODY, code="body_lost")
    return bytes(body)
