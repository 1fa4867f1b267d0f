"""ApiError: what is wrong with a request, as an HTTP status, a code and a message that a client may read."""

import logging
import re
import traceback

import msgspec

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 500  # six bytes each at worst in JSON: a body stays below 4 KB
Headers = list[tuple[bytes, bytes]]  # as ASGI has them
_UNREAD = (408, 413, 431)  # the rest of what the client sends is not waited for
_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


class ApiError(Exception):
    """Ends one request with an OpenAI error object. Handled in deployments/api/routes.py."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """`message` names the field and the remedy; it must not quote what the client sent at length."""
        super().__init__(message)
        self.status = status
        self.message = message[:MAX_MESSAGE_CHARS]
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def label(self) -> str:
        """What logs call it: the code, else the type."""
        return self.code or self._kind

    @property
    def _kind(self) -> str:
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return kind if self.status < 500 else "server_error"

    def body(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it."""
        error = {"message": self.message, "type": self._kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> Headers:
        """ASGI headers of the error's response."""
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.status in _UNREAD or self.code == "body_lost":
            headers.append((b"connection", b"close"))
        if self.status == 504:
            headers.append((b"x-should-retry", b"false"))  # OpenAI's clients would send the same twice more
        return headers


def internal_error() -> ApiError:
    """500: a bug in the server; its details are in the log only."""
    return ApiError(500, "internal error; the server's log says more", code="internal_error")


def server_full(what: str, retry_after_s: int = 1) -> ApiError:
    """503: `what` there is already, in words."""
    message = f"the server is full ({what}); try again in {retry_after_s} s"
    return ApiError(503, message, code="server_overloaded", retry_after_s=retry_after_s)


def log_unexpected(error: Exception) -> None:
    """Log where an error happened, but not its message, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s while answering a request:\n%s", type(error).__name__, frames)


def shown(name: object) -> str:
    """A name that the client chose, if it is plain enough to be repeated; else a stand-in."""
    return name if isinstance(name, str) and _PLAIN_NAME.fullmatch(name) else "(unprintable name)"
