"""The edge: stands before Serve's own HTTP code, and takes out headers by which a client would command it.

Serve calls `middlewares` in its proxies, and in HAProxy mode in each replica, where the environment says
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.edge:middlewares; `make serve` sets it. Without it no request
outlives its client or its deadline either, but a header that is not UTF-8 is answered with 500 in Serve's own words.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# Serve takes these from anybody (ray/serve/_private/http_util.py): no watch for a client that leaves, another timeout
# than ours, and a second's search for a replica that has a "model" of this name.
COMMANDS = {b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve-multiplexed-model-id"}


class Edge:
    """An ASGI middleware that changes nothing but headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on without them."""
        if "headers" in scope:
            scope = {**scope, "headers": [header for header in scope["headers"] if _may_pass(*header)]}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve asks for."""
    return [Middleware(Edge)]


def _may_pass(name: bytes, value: bytes) -> bool:
    try:
        (name + value).decode()  # Serve does, of some without a guard
    except UnicodeDecodeError:
        return False
    return name.lower().replace(b"_", b"-") not in COMMANDS
