"""Serving under test, seen from outside: a port that stays free, a server at its URL, and a run of `make serve`."""

import asyncio
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 240.0  # for what has no promised time, on a machine that does other things too
MARK = "STAGEMESH_TEST_RUN"


def _candidates() -> list[int]:
    """Ports that nobody else chooses, in random order; see free_port."""
    try:
        ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        ephemeral = 32768
    # A kernel whose ephemeral ports begin so low that nothing is left below them: then only luck helps.
    ports = range(20_000, min(ephemeral, 30_000)) or range(20_000, 30_000)
    return random.SystemRandom().sample(ports, len(ports))  # not what another process with the same seed has


_PORTS = iter(_candidates())


def free_port() -> int:
    """A port that is free now and still will be when it is used; never the same twice in a process.

    A server under test binds its port seconds or minutes after it was chosen. One that the kernel had chosen (port 0,
    closed again) is ephemeral: meanwhile any socket for which the kernel chooses may get it, and Ray opens hundreds.
    So it is one from below the ephemeral ports, above those of Ray's workers (10002 to 19999), and below those of
    Serve's replicas behind HAProxy (30000 to 31000).
    """
    return next(port for port in _PORTS if _is_free(port))


def _is_free(port: int) -> bool:
    for address in ("127.0.0.1", "0.0.0.0"):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def until(condition: Callable[[], Any], within_s: float = PATIENCE_S, every_s: float = 0.02) -> float:
    """Seconds until the condition holds; fails when it does not in time."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"not within {within_s:g} s"
        time.sleep(every_s)
    return time.monotonic() - began


async def until_true(condition: Callable[[], Any], within_s: float = 20, every_s: float = 0.005) -> None:
    """The same on an event loop, whose other tasks go on."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        await asyncio.sleep(every_s)


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def reserved() -> set[str]:
    """The placement groups that hold something, in the Ray cluster of this process."""
    from ray.util.placement_group import placement_group_table

    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


@dataclass
class Served:
    """What is served at a URL, as its clients and its operator see it."""

    url: str

    def get(self, route: str) -> httpx.Response:
        return httpx.get(self.url + route, timeout=20)

    def post(self, body: dict[str, Any], timeout_s: float = 60) -> httpx.Response:
        return httpx.post(self.url + "/v1/completions", json=body, timeout=timeout_s)

    def status(self, route: str) -> int:
        """503 also while nothing listens."""
        try:
            return self.get(route).status_code
        except httpx.TransportError:
            return 503

    def is_ready(self) -> bool:
        return self.status("/ready") == 200

    def cluster(self) -> dict[str, Any]:
        state: dict[str, Any] = self.get("/cluster").json()
        return state

    def is_idle(self) -> bool:
        state = self.cluster()
        return state["requests"] == {"running": 0, "waiting": 0} and state["kv_blocks"]["used"] == 0

    def pids(self) -> list[int]:
        """By rank."""
        return [rank["pid"] for rank in self.cluster()["ranks"]]


class Run(Served):
    """One run of the program behind `make serve`; all its descendants inherit a mark. What is left at the end dies."""

    def __init__(
        self,
        folder: Path,
        name: str = "demo.yaml",
        *,
        ha_proxy: bool = False,
        environment: Mapping[str, str] | None = None,
        **args: dict[str, Any],
    ) -> None:
        """`args` are merged into those of the config of this name, group by group."""
        self.port = free_port()
        self.doors = {key: free_port() for key in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")}
        super().__init__(f"http://127.0.0.1:{self.port}")
        document = yaml.safe_load((ROOT / "configs" / name).read_text())
        document["http_options"]["port"] = self.port
        merged = document["applications"][0]["args"]
        for group, values in args.items():
            merged[group] = {**merged.get(group, {}), **values}
        config, self.log = folder / name, folder / "log"
        config.write_text(yaml.safe_dump(document))
        self.mark = uuid.uuid4().hex
        self._segments = set(Path("/dev/shm").iterdir())
        settings = {"RAY_ADDRESS": "local", MARK: self.mark}
        settings |= {} if ha_proxy else {"RAY_SERVE_ENABLE_HA_PROXY": "0"}  # it is the default
        settings |= {key: str(port) for key, port in self.doors.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deployments.serve.command", str(config)],
            cwd=ROOT,
            env={**os.environ, **settings, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(20)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def printed(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str = "Ctrl-C stops it.") -> str:
        """What was printed, once the words (without any: those of a server that is ready) are in it.

        Fails when the program ends without them, with what it printed.
        """
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if words in self.printed():
                return self.printed()
            assert not ended, self.printed()
            time.sleep(0.1)
        raise AssertionError(f"no {words!r} in:\n{self.printed()}")

    def wait(self, within_s: float = PATIENCE_S) -> int:
        """Its exit status."""
        return self.process.wait(within_s)

    def finished(self, reason: str) -> int:
        """Sequences that ended so, ever."""
        found = re.search(
            rf'requests_finished_total{{.*finished_reason="{reason}".*}} (\d+)', self.get("/metrics").text
        )
        assert found
        return int(found[1])

    def processes(self) -> list[psutil.Process]:
        """Those that carry the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def listening(self) -> dict[int, str]:
        """The ports that its processes listen on, and the address of each."""
        addresses = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                for found in process.net_connections("tcp"):
                    if found.status == psutil.CONN_LISTEN:
                        addresses[found.laddr.port] = found.laddr.ip
        return addresses

    def segments(self) -> set[Path]:
        """Of shared memory, made since the start, and not used by another process of this machine."""
        return {
            segment
            for segment in set(Path("/dev/shm").iterdir()) - self._segments
            if not any(str(segment) in _maps(process) for process in psutil.process_iter())
        }

    def assert_nothing_left(self) -> None:
        left = self.processes()
        assert not left, f"left running: {left}\n{self.printed()}"
        with socket.create_server(self.address):
            pass  # the port is free again


def _maps(process: psutil.Process) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/maps").read_text()
    return ""
