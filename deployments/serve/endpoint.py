"""The HTTP endpoint that a Serve config file asks for: its URL, whether its port is free, and whether it is ready."""

import errno
import http.client
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Endpoint:
    """Where an application listens."""

    host: str
    port: int
    prefix: str = ""  # of the application's routes; no slash at its end
    tls: bool = False

    @classmethod
    def of(cls, document: dict[str, Any], application: dict[str, Any]) -> "Endpoint":
        """From a Serve config file and its application, with Serve's defaults. Raises ValueError (without the file)."""
        options = document.get("http_options") or {}
        if not isinstance(options, dict):
            raise ValueError("http_options: should be a mapping, for example {host: 127.0.0.1, port: 8000}")
        port = options.get("port", 8000)
        if not isinstance(port, int) or not 1 <= port <= 65535:
            raise ValueError(f"http_options.port: should be a port from 1 to 65535, but it is {port!r}; 8000 is usual")
        prefix = str(application.get("route_prefix") or "/").rstrip("/")
        return cls(str(options.get("host", "0.0.0.0")), port, prefix, bool(options.get("ssl_certfile")))

    @property
    def url(self) -> str:
        """The base URL for a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def check_free(self) -> None:
        """Raises ValueError, with the remedy, when the port cannot be listened on: mostly another program does."""
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
                probe.listen()
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ValueError(
                        f"http_options: {self.host}:{self.port} cannot be listened on ({error.strerror}); set host to "
                        "an address of this machine (127.0.0.1, or 0.0.0.0 for all) and port to one above 1023"
                    ) from None
                raise ValueError(
                    f"http_options.port: {self.host}:{self.port} cannot be listened on ({error.strerror}); "
                    f"stop the program that uses port {self.port} (`ss -ltnp 'sport = :{self.port}'` shows it), "
                    "or set http_options.port in this file to a free one"
                ) from None

    def is_ready(self) -> bool:
        """Whether GET /ready answers 200. Not asked with TLS, as the certificate is for another host: always True."""
        if self.tls:
            return True
        address = self.url.removeprefix("http://").removesuffix(self.prefix)
        connection = http.client.HTTPConnection(address, timeout=2.0)
        try:
            connection.request("GET", f"{self.prefix}/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
