"""One run of the program behind `make serve`, watched from outside: its answers, its processes, what it leaves."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
MARK = "STAGEMESH_TEST_RUN"
PATIENCE_S = 240.0  # for a machine that does other things too


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def until(condition: Callable[[], Any], within_s: float = PATIENCE_S, every_s: float = 0.02) -> float:
    """Seconds until the condition holds; fails when it does not in time."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"not within {within_s:g} s"
        time.sleep(every_s)
    return time.monotonic() - began


class Run:
    """Serves the demo; all its descendants inherit a mark."""

    def __init__(self, folder: Path, ha_proxy: bool, environment: dict[str, str], **args: dict[str, Any]) -> None:
        """`args` are merged into the demo's, group by group."""
        document = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
        self.port = document["http_options"]["port"] = free_port()
        merged = document["applications"][0]["args"]
        for group, values in args.items():
            merged[group] = {**merged.get(group, {}), **values}
        config, self.log = folder / "demo.yaml", folder / "log"
        config.write_text(yaml.safe_dump(document))
        self.mark = uuid.uuid4().hex
        self._segments = set(Path("/dev/shm").iterdir())
        doors = {"RAY_SERVE_HAPROXY_METRICS_PORT": free_port(), "RAY_SERVE_HAPROXY_STATS_PORT": free_port()}
        settings = {key: str(port) for key, port in doors.items()} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deployments.serve_command", str(config)],
            cwd=ROOT,
            env={
                **os.environ,
                "RAY_ADDRESS": "local",
                "RAY_SERVE_ENABLE_HA_PROXY": str(int(ha_proxy)),
                MARK: self.mark,
                **settings,
            },
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )
        until(lambda: "Ctrl-C stops it." in self.printed() or self.process.poll() is not None, every_s=0.1)
        assert self.process.poll() is None, self.printed()

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def printed(self) -> str:
        return self.log.read_text()

    def get(self, route: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{route}", timeout=20)

    def post(self, body: dict[str, Any], timeout_s: float = 60) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=timeout_s)

    def cluster(self) -> dict[str, Any]:
        state: dict[str, Any] = self.get("/cluster").json()
        return state

    def finished(self, reason: str) -> int:
        """Sequences that ended so, ever."""
        found = re.search(
            rf'requests_finished_total{{.*finished_reason="{reason}".*}} (\d+)', self.get("/metrics").text
        )
        assert found
        return int(found[1])

    def is_idle(self) -> bool:
        state = self.cluster()
        return state["requests"] == {"running": 0, "waiting": 0} and state["kv_blocks"]["used"] == 0

    def processes(self) -> list[psutil.Process]:
        """Those that carry the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def segments(self) -> set[Path]:
        """Of shared memory, made since the start, and not used by another process of this machine."""
        return {
            segment
            for segment in set(Path("/dev/shm").iterdir()) - self._segments
            if not any(str(segment) in _maps(process) for process in psutil.process_iter())
        }

    def end(self) -> None:
        """Whatever is left of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.process.wait(20)


def _maps(process: psutil.Process) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/maps").read_text()
    return ""
