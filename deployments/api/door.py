"""The door: what every request passes before its route: the size of its headers, its API key, and the key's limits."""

from contextlib import ExitStack
from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.connection import Connection
from deployments.api.errors import ApiError
from deployments.api.key_limits import KeyAccount, KeyAccounts
from deployments.api.key_ring import KeyRing
from deployments.api.request_log import PROBES, current_request, route_of

OPEN = PROBES | {"/version"}  # all else wants a key
MAX_HEADER_BYTES = 32 * 1024


class Door:
    """An ASGI middleware. `scope["state"]["account"]` says to the routes whose request it is."""

    def __init__(self, app: ASGIApp, ring: KeyRing | None, accounts: KeyAccounts) -> None:
        """`ring`: the keys that are asked for; None: everybody may use everything."""
        self._app = app
        self._ring = ring
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an error: 401 without a key that is known, 429, 431."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                _check_size(scope)
                account = await self._account(scope)
                if record := current_request():
                    record.key = account.name or None
                send = partial(_send_with_limits, send, account)
                if scope["method"] == "POST":
                    held.enter_context(account.request())
            except ApiError as error:
                await Connection(receive, send).fail(error)
                return
            scope.setdefault("state", {})["account"] = account
            await self._app(scope, receive, send)

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


async def _send_with_limits(send: Send, account: KeyAccount, message: Message) -> None:
    if message["type"] == "http.response.start":
        message = {**message, "headers": [*message.get("headers", ()), *account.headers()]}
    await send(message)
