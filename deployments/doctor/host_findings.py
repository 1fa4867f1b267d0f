"""What a node's limits, memory, disk, network, environment and access mean for serving."""

from collections.abc import Callable, Iterator

from cluster.placement.interfaces import chosen
from deployments.doctor.facts import Bucket, Cuda, Disk, Hub, Limits, Network, NodeFacts, SharedMemory
from deployments.doctor.findings import Finding, fail, not_checked, ok, warn
from deployments.serve.environment import ENVIRONMENT, lacking

_GB, _MIB = 10**9, 1 << 20
_FEWEST_FILES, _FEW_FILES = 1024, 8192
_DOCKERS_SHM = 64 * _MIB
_FREE_SHM = 1 << 30  # NCCL's buffers between processes of a node, where GPUs cannot read each other's memory
_SHM = "/dev/shm"  # noqa: S108 - the kernel's place for it
_SLOW_DISK = 50e6  # bytes a second: slower than any disk that checkpoints are meant to be read from
# A smaller and shorter sample shows how soon a disk begins, not how fast it is
_TELLING_BYTES, _TELLING_S = 32 << 20, 1.0
_PATIENT_SHARE = 0.5  # of timeouts.start_s, for reading the weights

# Left over from a search for faults: slow, or hang, and nobody remembers them.
_LEFTOVERS = {
    "NCCL_P2P_DISABLE": ("1", "GPUs exchange through the host's memory, at a tenth of NVLink's speed"),
    "NCCL_SHM_DISABLE": ("1", "processes of a node exchange through the network"),
    "NCCL_IB_DISABLE": ("1", "nodes exchange by TCP, not by InfiniBand or RoCE"),
    "NCCL_NVLS_ENABLE": ("0", "NVSwitches do not add, which takes a quarter of the all-reduce's speed"),
    "NCCL_ALGO": (None, "NCCL does not choose its algorithm by size"),
    "NCCL_PROTO": (None, "NCCL does not choose its protocol by size"),
    "NCCL_DEBUG": (("INFO", "TRACE"), "NCCL writes lines for each communicator"),
    "NCCL_CUMEM_ENABLE": ("0", "NCCL cannot share memory by its newer way, which NVLS needs"),
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel is waited for"),
    "TORCH_DISTRIBUTED_DEBUG": (("INFO", "DETAIL"), "each collective is checked by another one"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "the host waits for each collective"),
}


def host_findings(node: NodeFacts, on_gpus: bool, start_s: float, judge_environment: bool) -> Iterator[Finding]:
    """All of one node. `on_gpus`: ranks get GPUs; `judge_environment`: Ray was started by others than `make serve`."""
    for section, why in node.unread.items():
        yield not_checked(
            section, node.name, why, f"run `stagemesh doctor --node` on {node.name}, and look where it stops"
        )
    found = node.sections
    if "limits" in found:
        yield from _limits(node.name, found["limits"], found.get("network"))
    if "shm" in found:
        yield from _shared_memory(node.name, found["shm"], on_gpus)
    if "network" in found:
        yield from _network(node, found["network"])
    if "environment" in found:
        yield from _environment(node, found["environment"], judge_environment)
    if "cuda" in found and node.hosts_ranks and (on_gpus or found["cuda"].on_bus):
        yield from _cuda(node.name, found["cuda"], fail if on_gpus else warn)
    if node.hosts_ranks:
        yield from _access(node, start_s)
    if found.get("http_port") is not None:
        yield _port(node.name, found["http_port"])


def _limits(where: str, limits: Limits, network: Network | None) -> Iterator[Finding]:
    files = f"{limits.open_files} open files a process"
    remedy = "`ulimit -n 65536` before `ray start` (LimitNOFILE= in systemd, --ulimit nofile=65536 in docker)"
    if limits.open_files < _FEWEST_FILES:
        yield fail("open files", where, f"{files}; Ray and the ranks need more", remedy)
    elif limits.open_files < _FEW_FILES:
        yield warn("open files", where, f"{files}: enough for few ranks and connections", remedy)
    else:
        yield ok("open files", where, files)
    if network is not None and network.rdma:
        if limits.locked_bytes >= 0:
            yield warn(
                "locked memory",
                where,
                f"at most {limits.locked_bytes / _MIB:.0f} MiB, and there is InfiniBand or RoCE, which locks buffers",
                "`ulimit -l unlimited` before `ray start`, or the capability IPC_LOCK in a container",
            )
        for port, state in network.rdma.items():
            if "ACTIVE" not in state:
                yield warn("fast network", where, f"{port} is {state}", "look at its cable and switch, and `ibstat`")


def _shared_memory(where: str, shm: SharedMemory, on_gpus: bool) -> Iterator[Finding]:
    size = f"{_SHM}: {shm.free_bytes / _GB:.2f} of {shm.size_bytes / _GB:.2f} GB free"
    larger = "a larger /dev/shm: docker run --shm-size=16g, or an emptyDir of medium Memory in Kubernetes"
    if shm.stale:
        yield warn(
            "shared memory",
            where,
            f"{len(shm.stale)} segments that nobody uses, {shm.stale_bytes / _GB:.2f} GB, left by killed ranks",
            f"remove them while nothing serves: rm {' '.join(f'{_SHM}/{name}' for name in shm.stale[:3])}"
            + (" …" if shm.stale[3:] else ""),
        )
    if shm.size_bytes <= _DOCKERS_SHM:
        yield fail("shared memory", where, f"{size}; Ray's object store and NCCL's buffers do not fit", larger)
    elif on_gpus and shm.free_bytes < _FREE_SHM:
        yield warn("shared memory", where, f"{size}; NCCL may need 1 GiB", larger)
    else:
        yield ok("shared memory", where, size)


def _network(node: NodeFacts, network: Network) -> Iterator[Finding]:
    addresses = ", ".join(f"{one.name} {one.address}" for one in network.interfaces)
    if not network.resolves_to:
        yield warn(
            "names",
            node.name,
            f"its own name {network.hostname} does not resolve",
            f"add {network.hostname} to its DNS or /etc/hosts: gloo and NCCL's store look it up",
        )
    if node.address is not None and node.address not in [one.address for one in network.interfaces]:
        yield fail(
            "addresses",
            node.name,
            f"Ray knows it as {node.address}, which none of its interfaces has ({addresses})",
            "start Ray there with --node-ip-address of one of them: ranks listen at that address",
        )
    elif network.resolves_to:
        yield ok("names", node.name, f"{network.hostname} resolves; {addresses}")


def _environment(node: NodeFacts, environment: dict[str, str], judge_lacks: bool) -> Iterator[Finding]:
    where = node.name
    lacks = lacking(environment) if judge_lacks else {}
    for name, cost in lacks.items():
        yield warn(
            "environment", where, f"lacks {name}: {cost}", f"{name}={ENVIRONMENT[name]} on this node before `ray start`"
        )
    left = 0
    for name, (bad, cost) in _LEFTOVERS.items():
        value = environment.get(name)
        if value is not None and (bad is None or value in bad):
            left += 1
            yield warn("environment", where, f"{name}={value}: {cost}", f"unset {name} before `ray start`")
    interfaces = list(_interfaces(node, environment))
    yield from interfaces
    if not lacks and not left and not interfaces:
        there = "all that `make serve` sets is there, and" if judge_lacks else "`make serve` sets what it needs;"
        yield ok("environment", where, f"{there} nothing is left over that slows")


def _interfaces(node: NodeFacts, environment: dict[str, str]) -> Iterator[Finding]:
    """Whether the interfaces that the environment names are those by which nodes reach each other."""
    network: Network | None = node.sections.get("network")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        spec = environment.get(name)
        if not spec or network is None:
            continue
        meant = chosen(spec, network.interfaces)
        if not meant:
            yield fail(
                "interface",
                node.name,
                f"{name}={spec} names none of its interfaces ({', '.join(one.name for one in network.interfaces)})",
                f"unset {name}: ranks then use the interface of Ray's address; or name one that is there",
            )
        elif node.address is not None and node.address not in [one.address for one in meant]:
            yield fail(
                "interface",
                node.name,
                f"{name}={spec} means {meant[0].name} {meant[0].address}, but Ray knows the node as {node.address}",
                f"unset {name}, or start Ray with --node-ip-address={meant[0].address}, the same network on all nodes",
            )


def _cuda(where: str, cuda: Cuda, judged: Callable[..., Finding]) -> Iterator[Finding]:
    """`judged` is what a fault of it is: where ranks are on CPUs, no failure."""
    if cuda.init_code == 0:
        yield ok("CUDA", where, "starts")
    elif cuda.init_code == 802:
        yield judged(
            "CUDA",
            where,
            "error 802: the NVSwitches' fabric is not ready",
            "start nvidia-fabricmanager, of the driver's version, then restart the node's containers",
        )
    elif cuda.init_code is not None:
        yield judged("CUDA", where, f"error {cuda.init_code} at its start", "look at `nvidia-smi` and `dmesg`; reboot")
    elif cuda.on_bus:
        yield judged(
            "CUDA",
            where,
            f"{cuda.on_bus} NVIDIA GPUs on the bus, but there is no driver here",
            "install the driver; in a container start it with --gpus all (the NVIDIA container toolkit)",
        )


def _access(node: NodeFacts, start_s: float) -> Iterator[Finding]:
    disk: Disk | None = node.sections.get("disk")
    hub: Hub | None = node.sections.get("hub")
    if (refusal := node.sections.get("checkpoint")) is not None:
        words, _, remedy = refusal.partition("; ")
        yield fail("checkpoint", node.name, words, remedy or "correct model.source")
    if hub is not None:
        yield _hub(node.name, hub, disk is not None and disk.stored_bytes > 0)
    if (bucket := node.sections.get("bucket")) is not None:
        yield _bucket(node.name, bucket)
    if disk is None:
        return
    needed = max(disk.stored_bytes, hub.model_bytes or 0 if hub is not None else 0)
    if needed - disk.stored_bytes > disk.free_bytes:
        yield fail(
            "room",
            node.name,
            f"the checkpoint has {needed / _GB:.1f} GB, and {disk.folder} has {disk.free_bytes / _GB:.1f} GB free",
            "put it on a larger disk: HF_HOME for hub ids, model.source for a folder",
        )
    else:
        there = f"{disk.stored_bytes / _GB:.2f} GB there" if disk.stored_bytes else "not downloaded yet"
        yield ok("room", node.name, f"checkpoint: {there}; {disk.free_bytes / _GB:.1f} GB free at {disk.folder}")
    yield _disk_speed(node.name, disk, needed, start_s)


def _disk_speed(where: str, disk: Disk, needed: int, start_s: float) -> Finding:
    if disk.read_bytes_per_s is None:
        return not_checked(
            "disk speed", where, f"{disk.folder} holds nothing to read and cannot be written to", "give us write access"
        )
    seconds, rate = needed / disk.read_bytes_per_s, f"{disk.read_bytes_per_s / 1e6:.0f} MB/s past the page cache"
    is_telling = disk.sample_bytes >= _TELLING_BYTES or disk.sample_bytes >= _TELLING_S * disk.read_bytes_per_s
    is_slow = disk.read_bytes_per_s < _SLOW_DISK and is_telling
    remedy = "copy the checkpoint to a local NVMe disk, and set model.source to that folder"
    if seconds > start_s:
        wait = f"the whole checkpoint takes {seconds:.0f} s, and timeouts.start_s is {start_s:g}"
        return fail("disk speed", where, f"{rate}: {wait}", f"{remedy}; or raise timeouts.start_s")
    if seconds > _PATIENT_SHARE * start_s or is_slow:
        return warn("disk speed", where, f"{rate}: {seconds:.0f} s for the whole checkpoint", remedy)
    return ok("disk speed", where, rate)


def _hub(where: str, hub: Hub, is_stored: bool) -> Finding:
    if hub.status is None:
        found = f"{hub.endpoint} is not reached ({hub.reason})"
        if is_stored:
            return ok("hub", where, f"{found}, but the checkpoint is in the local cache")
        return fail(
            "hub",
            where,
            f"{found}, and the checkpoint is not in the local cache",
            "open the way to it, set HF_ENDPOINT to a mirror, or copy the checkpoint to a folder",
        )
    if hub.status < 400:
        return ok("hub", where, "the model is there and open to us")
    if hub.status in (401, 403):
        token = "the token may not read it" if hub.has_token else "no token is set"
        return fail(
            "hub",
            where,
            f"HTTP {hub.status}: {token}",
            "accept the model's license on its page, then set HF_TOKEN on this node before `ray start`",
        )
    remedy = "correct model.source and model.revision" if hub.status == 404 else "try again later"
    return fail("hub", where, f"HTTP {hub.status} from {hub.endpoint}", remedy)


def _bucket(where: str, bucket: Bucket) -> Finding:
    if bucket.problem is None:
        return ok("store", where, f"{bucket.url} is there and open to us")
    return fail(
        "store",
        where,
        f"{bucket.url}: {bucket.problem}",
        "give this node the credentials and the way to the store before `ray start`, or correct model.source",
    )


def _port(where: str, is_free: bool) -> Finding:
    if is_free:
        return ok("HTTP port", where, "free")
    return warn(
        "HTTP port",
        where,
        "something listens there: a server of ours that runs already, or another program",
        "stop it (`ss -ltnp` shows it), or set http_options.port in the config file",
    )
