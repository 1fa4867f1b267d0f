"""A store on loopback: files over HTTP with ranges and ETags, every request counted, and faults of all kinds."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """One request that sent bytes of a file."""

    name: str
    first: int
    end: int


Fault = Callable[[str, int, int], str | None]  # of a file's name and a range: "503", "short", "cut", "slow", or none


class RangeServer:
    """Serves a folder's files under /checkpoint/. `sent` are the bytes that went out, by request."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.fault: Fault = lambda name, first, end: None
        self.sends_ranges = True
        self.sent: list[Request] = []
        self.is_away = False
        self.seconds_each = 0.0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/checkpoint"

    def sent_bytes(self, name: str | None = None) -> int:
        """Bytes of files that went out."""
        return sum(one.end - one.first for one in self.sent if name in (None, one.name))

    def weights(self) -> list[Request]:
        """The requests for weights beyond their headers."""
        return [
            one for one in self.sent if one.name.endswith(".safetensors") and one.first >= self.header_end(one.name)
        ]

    def header_end(self, name: str) -> int:
        """Where the data of a file begin."""
        return 8 + int.from_bytes(self.files[name][:8], "little")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(has_body=False)

            def do_GET(self) -> None:
                self._answer(has_body=True)

            def _answer(self, has_body: bool) -> None:
                name = self.path.removeprefix("/checkpoint").strip("/")
                if store.is_away:
                    self.close_connection = True
                    self.connection.close()
                elif not name:
                    links = "".join(f'<a href="{one}">{one}</a>' for one in store.files).encode()
                    self._send(200, links, {"Content-Type": "text/html"}, has_body)
                elif name not in store.files:
                    self._send(404, b"", {}, has_body)
                else:
                    self._file(name, store.files[name], has_body)

            def _file(self, name: str, data: bytes, has_body: bool) -> None:
                headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Content-Type": "application/octet-stream"}
                first, end = 0, len(data)
                asked = self.headers.get("Range") if store.sends_ranges else None
                if asked:
                    start, _, last = asked.removeprefix("bytes=").partition("-")
                    first, end = int(start), min(int(last) + 1, len(data))
                    headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                fault = store.fault(name, first, end) if has_body else None
                if fault == "503":
                    self._send(503, b"", {}, has_body)
                    return
                if fault == "slow":
                    threading.Event().wait(store.seconds_each)
                body = data[first:end]
                if fault == "short":
                    body = body[: len(body) // 2]
                with store._lock:
                    if has_body:
                        store.sent.append(Request(name, first, first + len(body)))
                self._send(206 if asked else 200, body, headers, has_body, is_cut=fault == "cut")

            def _send(
                self, status: int, body: bytes, headers: dict[str, str], has_body: bool, is_cut: bool = False
            ) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if has_body:
                    self.wfile.write(body[: len(body) // 2] if is_cut else body)
                if is_cut:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

        return Handler

    @contextmanager
    def running(self) -> Iterator["RangeServer"]:
        """Serve until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
