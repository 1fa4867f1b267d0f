"""The door: what every request passes before its route: the size of its headers, its API key, and the key's limits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.connection import Connection
from deployments.api.errors import ApiError, internal_error, log_unexpected, server_full
from deployments.api.key_limits import KeyAccount, KeyAccounts
from deployments.api.key_ring import KeyRing
from deployments.api.request_log import PROBES, current_request, route_of

OPEN = PROBES | {"/version"}  # all else wants a key
MAX_HEADER_BYTES = 32 * 1024
MAX_BODIES_BYTES = 512 << 20  # of all bodies together


class Bodies:
    """Counts the bytes of bodies from when they arrive until their requests have ended."""

    def __init__(self) -> None:
        self.num_bytes = 0

    @contextmanager
    def counted(self, receive: Receive) -> Iterator[Receive]:
        """Count what is received while the block runs; a body alone may have any size.

        To receive raises ApiError (503) where it is too much beside the bodies of others.
        """
        num_own = 0

        async def counting() -> Message:
            nonlocal num_own
            message = await receive()
            num_more = len(message.get("body", b""))
            if self.num_bytes > num_own and self.num_bytes + num_more > MAX_BODIES_BYTES:
                raise server_full(f"{self.num_bytes} bytes of other bodies")
            num_own += num_more
            self.num_bytes += num_more
            return message

        try:
            yield counting
        finally:
            self.num_bytes -= num_own


class Door:
    """An ASGI middleware. `scope["state"]["account"]` says to the routes whose request it is."""

    def __init__(self, app: ASGIApp, ring: KeyRing | None, accounts: KeyAccounts) -> None:
        """`ring`: the keys that are asked for; None: everybody may use everything."""
        self._app = app
        self._ring = ring
        self._accounts = accounts
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an error: 401 without a key that is known, 429, 431.

        What goes wrong unforeseen in a route is answered here: so its line tells of it, and web pages may read it.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                _check_size(scope)
                account = await self._account(scope)
                if record := current_request():
                    record.key = account.name or None
                send = answer = _Answer(send, account)
                if scope["method"] == "POST":
                    held.enter_context(account.request())
            except ApiError as error:
                await Connection(receive, send).fail(error)
                return
            scope.setdefault("state", {})["account"] = account
            try:
                await self._app(scope, held.enter_context(self._bodies.counted(receive)), send)
            except ClientDisconnect:
                pass
            except Exception as error:
                if answer.has_begun:
                    raise
                log_unexpected(error)
                await Connection(receive, send).fail(internal_error())

    async def _account(self, scope: Scope) -> KeyAccount:
        if self._ring is None or route_of(scope) in OPEN:
            return self._accounts.of_nobody
        await self._ring.look()
        key = self._ring.find(_sent(scope))
        if key is None:
            message = (
                "this server wants an API key that it knows; send it as `Authorization: Bearer KEY` or `x-api-key`"
            )
            raise ApiError(401, message, code="invalid_api_key")
        return self._accounts.of(key)


def _check_size(scope: Scope) -> None:
    num_bytes = sum(len(name) + len(value) + 4 for name, value in scope["headers"])  # with ": " and the line's end
    if num_bytes > MAX_HEADER_BYTES:
        raise ApiError(431, f"the headers have {num_bytes} bytes; at most {MAX_HEADER_BYTES} are taken")


def _sent(scope: Scope) -> str:
    """The key that the client sends, as OpenAI's or Anthropic's clients do; empty where it sends none."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


class _Answer:
    """Sends an answer, with what is left to its key."""

    def __init__(self, send: Send, account: KeyAccount) -> None:
        self._send = send
        self._account = account
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message = {**message, "headers": [*message.get("headers", ()), *self._account.headers()]}
        await self._send(message)
