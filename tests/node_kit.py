"""Ray nodes of one machine that are as far apart as machines: in namespaces, on a switch that leads nowhere else.

Each node has a network, process ids, /tmp, /dev/shm and a host name of its own, and an address on the switch. It ends
with its first process, and all of them with the test, as the kernel ends a namespace whole; nothing outside is touched.
Needs Linux, root and iproute2.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from deployments.serve.environment import ENVIRONMENT
from tests.serving import ROOT, Served, free_port, until

NETWORK = "10.77.9"  # the first three numbers of every node's address; node 0 is .1
STRAY = "10.78.9"  # the same for the nodes' second interface, whose cable ends nowhere
PORT = 6379  # of Ray's head
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
EPHEMERAL = "32768-60999"  # ports that the kernel chooses
CHILD = ["setpriv", "--pdeathsig", "KILL"]  # it ends with this process, however that ends
KINDS = ["--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc", "--kill-child=KILL"]
# A node's first process. What is in the shared folder is on every node, as on a disk that all of them mount; so is the
# checkout, wherever it lies.
FIRST = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /mnt
for shared in "$2" "$3"; do
  case "$shared" in /tmp/*) mkdir -p "/mnt${shared#/tmp}"; mount --bind "$shared" "/mnt${shared#/tmp}" ;; esac
done
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
mount --move /mnt /tmp
mount -t tmpfs tmpfs /dev/shm
read -r _  # the network is there
shift 3
exec "$@"
"""


@cache
def why_not() -> str | None:
    """Why no nodes can be made here, for skipif; None where they can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]
    if missing:
        return f"namespaces need {', '.join(missing)}"
    probe = "ip link add name probe0 type bridge && ip link add name probe1 type veth peer name probe2"
    tried = subprocess.run(["unshare", *KINDS, "sh", "-c", probe], capture_output=True, text=True)
    return f"no leave to make namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Node:
    """One node, from `start` to its end; it can be started again, as a machine can."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.name = f"node{number}"
        self.address = f"{NETWORK}.{number + 1}"
        self.log = folder / self.name
        self.pid = 0  # of its first process, seen from outside; 0: it is off
        self._said_before = 0  # bytes of the log from its earlier lives
        self._folder = folder
        self._outer: subprocess.Popen[bytes] | None = None

    def start(self, switch: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Switch it on, with `command` as its first process. `switch`: a process on the switch."""
        assert not self.pid, f"{self.name} is on"
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        words = [*CHILD, "unshare", *KINDS, "bash", "-c", FIRST, "bash", self.name, str(self._folder), str(ROOT)]
        with self.log.open("ab") as log:
            self._outer = subprocess.Popen(
                [*words, *command], cwd=ROOT, env=dict(environment), stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        until(lambda: _children(self._outer), within_s=20)
        (self.pid,) = _children(self._outer)
        for cable, name, address in ((f"p{self.number}", "eth0", self.address), (f"s{self.number}", "mgmt0", "")):
            with contextlib.suppress(AssertionError):  # of its last life, which the kernel clears away in its own time
                _ip(switch, f"link del {cable}")
            _ip(switch, f"link add name {cable} type veth peer name {name} netns {self.pid}")
            address = address or f"{STRAY}.{self.number + 1}"
            _ip(self.pid, f"addr add {address}/24 dev {name}", f"link set {name} up")
            _ip(switch, f"link set {cable} up", *([f"link set {cable} master switch"] if name == "eth0" else []))
        # Ray looks for the address that leads out; this one leads to the switch alone
        _ip(self.pid, "link set lo up", f"route add default dev eth0 src {self.address}")
        assert self._outer.stdin is not None
        self._outer.stdin.write(b"\n")
        self._outer.stdin.flush()

    def inside(self, *command: str) -> list[str]:
        """A command line that runs on the node."""
        spaces = ["--net", "--pid", "--mount", "--uts", "--ipc"]
        entered = ["nsenter", "--target", str(self.pid), *spaces, "bash", "-c", 'cd "$0" && exec "$@"', str(ROOT)]
        return [*entered, *command]

    def kill(self) -> float:
        """All its processes end; the kernel still closes their connections. Returns when (monotonic seconds)."""
        moment = time.monotonic()
        self._signal(signal.SIGKILL)
        self.wait(20)
        return moment

    def terminate(self) -> float:
        """SIGTERM to the first process, as a kubelet does; `wait` for the end. Returns when."""
        moment = time.monotonic()
        self._signal(signal.SIGTERM)
        return moment

    def wait(self, within_s: float) -> None:
        """Until it is off."""
        if self._outer is not None:
            self._outer.wait(within_s)
            assert self._outer.stdin is not None
            self._outer.stdin.close()
        self.pid, self._outer = 0, None

    def has_ended(self) -> bool:
        """Whether its first process ended by itself."""
        return self._outer is not None and self._outer.poll() is not None

    def printed(self) -> str:
        """What its first process printed in this life."""
        return self.log.read_bytes()[self._said_before :].decode(errors="replace")

    def root(self, path: str) -> Path:
        """A path of the node, seen from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def _signal(self, number: signal.Signals) -> None:
        if not self.pid and self._outer is not None and number == signal.SIGKILL:
            self._outer.kill()  # it has not got as far as its first process
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass
class Serving(Served):
    """`make serve` on a node."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def wait_until_ready(self) -> float:
        """Seconds that it took from now. Fails with what was printed when the command ends."""
        return until(self._is_ready_or_ended, within_s=400, every_s=0.1)

    def _is_ready_or_ended(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.is_ready()


class Nodes:
    """A switch, and nodes that are started one by one. Folders below /tmp alone can be shared with them."""

    def __init__(self, folder: Path, count: int, environment: Mapping[str, str] | None = None) -> None:
        """`folder` is seen by every node at its path; it gets a log each. `environment` is added to all processes'."""
        self.folder = folder
        self.nodes = [Node(number, folder) for number in range(count)]
        hosts = ["127.0.0.1 localhost", *(f"{node.address} {node.name}" for node in self.nodes)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "resolv.conf").write_text("")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment |= {"PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        self.environment |= {**ENVIRONMENT, "RAY_SERVE_ENABLE_HA_PROXY": "0", **(environment or {})}
        self._switch: subprocess.Popen[bytes] | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._doors: list[socket.socket] = []
        self._starts: dict[int, Callable[[], None]] = {}

    def __enter__(self) -> Self:
        self._switch = subprocess.Popen([*CHILD, "unshare", "--net", "sleep", "infinity"])
        own = Path("/proc/self/ns/net").readlink()
        until(lambda: Path(f"/proc/{self.switch}/ns/net").readlink() != own, within_s=20)
        _ip(self.switch, "link set lo up", "link add name switch type bridge", f"addr add {NETWORK}.254/24 dev switch")
        _ip(self.switch, "link set switch up")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._switch is not None
        with contextlib.ExitStack() as ends:  # all of them, whichever is late
            for process in (self._switch, *self._running):
                ends.callback(process.wait, 20)
                ends.callback(process.kill)
            for node in self.nodes:
                ends.callback(node.kill)
            for door in self._doors:
                ends.callback(door.close)

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    @property
    def switch(self) -> int:
        """A process on the switch."""
        assert self._switch is not None
        return self._switch.pid

    def start(self, number: int, *command: str, **environment: str) -> None:
        """Switch a node on, with a command as its first process."""
        self.nodes[number].start(self.switch, command, self.environment | environment)

    def start_ray(self, number: int, cpus: int, *more: str, **environment: str) -> None:
        """A Ray node, head where the number is 0; `ray start --block` is its first process, as in a pod."""
        node = self.nodes[number]
        self._starts[number] = partial(self.start_ray, number, cpus, *more, **environment)
        where = ["--head", f"--port={PORT}"] if number == 0 else [f"--address={self.nodes[0].address}:{PORT}"]
        where += ["--include-dashboard=false"] if number == 0 else []
        own = [f"--node-ip-address={node.address}", "--disable-usage-stats", "--block"]
        own += [f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=100000000"]
        self.start(number, *RAY, "start", *where, *own, *more, **environment)

    def wait_for_ray(self, *numbers: int) -> None:
        """Until Ray runs on nodes. It gives a node 30 s to start; one that took longer is started again."""

        def is_up(node: Node) -> bool:
            if node.has_ended():
                node.wait(20)
                self._starts[node.number]()
            return "Ray runtime started" in node.printed()

        for number in numbers:
            until(partial(is_up, self.nodes[number]), within_s=400, every_s=0.1)

    def alive(self) -> dict[str, str]:
        """Ray's living nodes: name → Ray's id. Empty while the head does not answer."""
        program = (
            "import sys\n"
            "from ray._raylet import GcsClient\n"
            "for one in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5).values():\n"
            "    if one.state == 0: print(one.node_manager_hostname, one.node_id.hex())"
        )
        said = self.run(0, sys.executable, "-c", program, f"{self.nodes[0].address}:{PORT}")
        return dict(line.split() for line in said.splitlines())

    def run(self, number: int, *command: str, timeout_s: float = 60) -> str:
        """What a command prints on a node; empty where it fails."""
        if not self.nodes[number].pid:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                self.nodes[number].inside(*command),
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=timeout_s,
            )
            return done.stdout if done.returncode == 0 else ""
        return ""

    def begin(self, number: int, *command: str, log: Path, **environment: str) -> "subprocess.Popen[bytes]":
        """A command that goes on on a node; it ends with the nodes at the latest."""
        words = [*CHILD, *self.nodes[number].inside(*command)]
        with log.open("w") as output:
            process = subprocess.Popen(
                words,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._running.append(process)
        return process

    def serve(self, config: dict[str, Any], door: int = 0) -> "Serving":
        """`make serve` on the head, with the `args` of a config file, and HTTP on the node `door` (and on others)."""
        document = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
        document["http_options"]["host"] = "0.0.0.0"
        document["proxy_location"] = "EveryNode" if door else "HeadOnly"
        document["applications"][0]["args"] = config
        path, log = self.folder / "serve.yaml", self.folder / "serve.log"
        path.write_text(yaml.safe_dump(document))
        command = [sys.executable, "-m", "deployments.serve.command", str(path)]
        process = self.begin(0, *command, log=log, RAY_ADDRESS=f"{self.nodes[0].address}:{PORT}")
        return Serving(self.url(door, document["http_options"]["port"]), process, log)

    def cut(self, number: int) -> float:
        """No packet passes to and from a node any more, and nobody is told. Returns when (monotonic seconds)."""
        moment = time.monotonic()
        _ip(self.switch, f"link set p{number} down")
        return moment

    def fail(self, number: int) -> float:
        """As when a node's power fails: it ends, and nobody is told. Returns when (monotonic seconds)."""
        moment = self.cut(number)
        self.nodes[number].kill()
        return moment

    def mend(self, number: int) -> float:
        """The cable is whole again. Returns when."""
        _ip(self.switch, f"link set p{number} up")
        return time.monotonic()

    def fence(self, number: int) -> None:
        """A firewall on a node that lets Ray's own ports through, and drops what goes to ports the kernel chose."""
        rule = f"rule add pref 10 iif eth0 ipproto tcp sport {EPHEMERAL} dport {EPHEMERAL} blackhole"
        _ip(self.nodes[number].pid, rule, "rule add pref 100 lookup local", "rule del pref 0")

    def url(self, number: int, port: int) -> str:
        """Where a port of a node is found from outside of all of them: at 127.0.0.1, through the switch."""
        door = socket.create_server(("127.0.0.1", free_port()), backlog=64)
        self._doors.append(door)
        target = (self.nodes[number].address, port)
        threading.Thread(target=self._let_in, args=(door, target), daemon=True).start()
        return f"http://127.0.0.1:{door.getsockname()[1]}"

    def _let_in(self, door: socket.socket, target: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):  # the door is closed
            while True:
                visitor, _ = door.accept()
                threading.Thread(target=self._carry, args=(visitor, target), daemon=True).start()

    def _carry(self, visitor: socket.socket, target: tuple[str, int]) -> None:
        with visitor, contextlib.suppress(OSError):
            _enter_network(self.switch)  # this thread alone
            with socket.create_connection(target, timeout=20) as inner:
                inner.settimeout(None)
                back = threading.Thread(target=_pump, args=(inner, visitor), daemon=True)
                back.start()
                _pump(visitor, inner)
                back.join()


class Stream(threading.Thread):
    """One stream, and when each piece of its text came; whatever befalls the connection is kept too."""

    def __init__(self, url: str, body: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url + "/v1/completions", dict(body)
        self.events: list[tuple[float, str]] = []  # monotonic seconds, text
        self.is_done = False
        self.failure = ""  # an error that the server sent, or how the connection ended
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=400) as response:
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.is_done = True
                    elif line.startswith("data: "):
                        self._take(json.loads(line.removeprefix("data: ")))
            if not self.is_done:
                self.failure = self.failure or f"ended with status {response.status_code} and without [DONE]"
        except httpx.HTTPError as error:
            self.failure = repr(error)
        self.ended_at = time.monotonic()

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.failure = json.dumps(event["error"])
        else:
            self.events.append((time.monotonic(), event["choices"][0]["text"]))

    def text(self) -> str:
        """All that it said, once it has ended."""
        self.join(600)
        assert self.is_done and not self.failure, self.failure or "the stream has not ended"
        return "".join(text for _, text in self.events)

    def longest_pause_s(self, since: float) -> float:
        """Of the times between two pieces that end after a moment, the longest."""
        moments = [at for at, _ in self.events]
        return max((after - before for before, after in pairwise(moments) if after > since), default=0.0)


def all_went_on(streams: Sequence[Stream], golden: Sequence[str]) -> bool:
    """Wait for all → whether each said word for word what it says when nothing happens."""
    return [stream.text() for stream in streams] == list(golden)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
    for one in (sink, source):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_WR if one is sink else socket.SHUT_RD)


def _enter_network(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{pid}/ns/net").open() as namespace:
        if libc.setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")


def _children(process: "subprocess.Popen[Any] | None") -> list[int]:
    assert process is not None and process.poll() is None, "the node ended at once; see its log"
    return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _ip(pid: int, *commands: str) -> None:
    """Run `ip` commands in the network of a process."""
    for words in commands:
        command = ["nsenter", "--target", str(pid), "--net", "ip", *words.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"ip {words}: {done.stderr}"
