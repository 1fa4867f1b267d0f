"""The edge: a middleware before Serve's own HTTP code that removes headers by which a client could control Serve.

Serve calls `middlewares` in its proxies, and in HAProxy mode in each replica, where the environment says
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.edge:middlewares; `make serve` sets it. Without it requests still
end with their client and deadline, but a header that is not UTF-8 is answered by Serve itself, with status 500.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api.request_log import is_sane_id

# Serve obeys these headers of any client (ray/serve/_private/http_util.py). They make it ignore that the client leaves,
# set another timeout than ours, or make it look for a second for a replica that has a multiplexed model.
COMMANDS = {b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve-multiplexed-model-id"}


class Edge:
    """An ASGI middleware that changes nothing but headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on without those headers."""
        if "headers" in scope:
            scope = {**scope, "headers": [header for header in scope["headers"] if _may_pass(*header)]}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """The middlewares that Serve puts around its own app."""
    return [Middleware(Edge)]


def _may_pass(name: bytes, value: bytes) -> bool:
    try:
        (name + value).decode()  # Serve decodes some headers, and does not expect an error
    except UnicodeDecodeError:
        return False
    name = name.lower().replace(b"_", b"-")
    if name == b"x-request-id":
        return is_sane_id(value.decode())  # Serve gives the request another one, and answers with it
    return name not in COMMANDS
