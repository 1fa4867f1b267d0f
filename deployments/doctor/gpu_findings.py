"""What NVML says of a node's GPUs and NVLinks, and what to do about it."""

from collections import Counter
from collections.abc import Iterator

from cluster.placement.nvlink import has_joined, unjoined_pairs
from cluster.placement.nvml import Gpu, NodeGpus
from deployments.doctor.facts import NodeFacts
from deployments.doctor.findings import Finding, fail, ok, warn

_GIB = 1 << 30
_IDLE_BYTES = _GIB  # what driver and idle contexts take at most
_RECOVERY = {  # NVML_GPU_RECOVERY_ACTION_*
    1: "reset it: `nvidia-smi --gpu-reset`",
    2: "reboot the node",
    3: "let no other GPU use it any more, then reset it",
    4: "let what runs end, then reset it",
    5: "reset its bus, or reboot the node",
}
_SLOWDOWNS = {  # nvmlClocksEventReason*
    0x08: ("hardware slowdown", "look at its cooling and its power cable"),
    0x20: ("too hot, by software", "look at its cooling and the room's"),
    0x40: ("too hot, by hardware", "look at its cooling and the room's"),
    0x80: ("power brake from outside", "look at the node's power supplies"),
}
_FABRIC_DONE = 3
_FABRIC_FAULTS = {  # [first bit, value that means trouble] of nvmlGpuFabricInfo_v3's healthMask
    "its bandwidth is degraded": (0, 1),
    "a route recovers": (2, 1),
    "a route is unhealthy": (4, 1),
}


def gpu_findings(node: NodeFacts, shards: int | None, require_nvlink: bool) -> Iterator[Finding]:
    """All of one node's GPUs. `shards` of a stage that would be there; None: no stage needs GPUs."""
    found: NodeGpus | None = node.sections.get("gpus")
    needs_gpus = shards is not None and node.hosts_ranks
    for trouble in found.troubles if found is not None else ():
        remedy = (
            "look at `nvidia-smi` and `dmesg` (lines with Xid); reset the GPU, reload the driver, or reboot the node"
        )
        yield (fail if needs_gpus else warn)("GPU state", node.name, f"NVML: {trouble}", remedy)
    if found is not None and found.troubles and not found.gpus:
        return
    if found is None or not found.gpus:
        if "gpus" not in node.sections:
            return
        if shards is None:
            yield ok("GPUs", node.name, "none")
        elif node.hosts_ranks:
            yield fail("GPUs", node.name, "none, and the config wants them", "add a GPU node, or set device: cpu")
        return
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in found.gpus).items())
    troubles = [trouble for gpu in found.gpus for trouble in _one(node, gpu)]
    yield from troubles
    yield from _users(node, found)
    if len({gpu.name for gpu in found.gpus}) > 1:
        yield warn("GPUs", node.name, names, "a stage should have equal GPUs: the slowest one sets its pace")
    elif not troubles and not found.troubles:
        yield ok("GPUs", node.name, f"{names}, driver {found.driver}: memory, clocks and PCIe are well")
    yield from _links(node, found, shards, require_nvlink)


def _one(node: NodeFacts, gpu: Gpu) -> Iterator[Finding]:
    """Troubles of one GPU."""
    where, name = node.name, f"GPU {gpu.index}"
    reset = "let what runs on it end, then `nvidia-smi --gpu-reset`, or reboot the node"
    if gpu.remap_failed:
        yield fail("GPU memory", where, f"{name}: a faulty row could not be replaced", "have this GPU exchanged")
    elif gpu.remap_pending:
        yield warn("GPU memory", where, f"{name}: a faulty row waits for a reset to be replaced", reset)
    if gpu.uncorrected_errors:
        yield fail("GPU memory", where, f"{name}: {gpu.uncorrected_errors} errors that ECC could not correct", reset)
    if gpu.recovery_action:
        remedy = _RECOVERY.get(gpu.recovery_action, "look at `nvidia-smi -q`")
        yield fail("GPU state", where, f"{name}: the driver asks for a recovery", remedy)
    for bit, (words, remedy) in _SLOWDOWNS.items():
        if (gpu.slowdowns or 0) & bit:
            yield warn("GPU clocks", where, f"{name} runs slower: {words}", remedy)
    if gpu.pcie_width is not None and gpu.most_pcie_width is not None and gpu.pcie_width < gpu.most_pcie_width:
        yield warn(
            "PCIe",
            where,
            f"{name} uses {gpu.pcie_width} of {gpu.most_pcie_width} lanes: weights load slower",
            "seat the card anew, or have its riser looked at",
        )
    if gpu.is_split:
        yield warn(
            "MIG", where, f"{name} is split: its parts have no NVLink", "`nvidia-smi -mig 0` where ranks want it whole"
        )
    if gpu.compute_mode:
        yield fail(
            "GPU state",
            where,
            f"{name} is in an exclusive or prohibited compute mode: spare ranks cannot start beside others",
            f"`nvidia-smi -i {gpu.index} -c DEFAULT`",
        )


def foreign_users(node: NodeFacts) -> list[Gpu]:
    """The GPUs in use, where they are more than Ray has given away."""
    found: NodeGpus | None = node.sections.get("gpus")
    gpus = found.gpus if found is not None else ()
    used = [gpu for gpu in gpus if is_used(gpu)]
    return used if len(used) > _given_away(node, len(gpus)) else []


def is_used(gpu: Gpu) -> bool:
    """Whether something computes on it, or holds its memory."""
    return bool(gpu.pids) or (gpu.used_bytes > _IDLE_BYTES and not gpu.is_split)


def by_whom(gpu: Gpu) -> str:
    """The processes that compute on it, as the end of a sentence; empty where NVML names none."""
    return f" by pid {', '.join(map(str, gpu.pids))}" if gpu.pids else ""


def _given_away(node: NodeFacts, count: int) -> float:
    return count - node.free_gpus if node.free_gpus is not None else 0.0


def _users(node: NodeFacts, found: NodeGpus) -> Iterator[Finding]:
    if used := foreign_users(node):
        given = _given_away(node, len(found.gpus))
        who = "; ".join(f"GPU {gpu.index}: {gpu.used_bytes / _GIB:.1f} GiB{by_whom(gpu)}" for gpu in used)
        yield warn(
            "GPU users",
            node.name,
            f"used, though Ray has given {given:g} of them away: {who}",
            "end those processes, or keep their GPUs from Ray (CUDA_VISIBLE_DEVICES before `ray start`)",
        )


def _links(node: NodeFacts, found: NodeGpus, shards: int | None, require_nvlink: bool) -> Iterator[Finding]:
    where = node.name
    for gpu in found.gpus:
        yield from _down(where, gpu, found, shards)
        if gpu.fabric_state in (1, 2):
            yield fail(
                "NVLink fabric",
                where,
                f"GPU {gpu.index}: the NVSwitches' fabric is not complete (state {gpu.fabric_state})",
                "start nvidia-fabricmanager, of the driver's version, and wait until it has ended its training",
            )
        for words, (shift, trouble) in _FABRIC_FAULTS.items():
            if gpu.fabric_state == _FABRIC_DONE and ((gpu.fabric_health or 0) >> shift) & 3 == trouble:
                yield warn("NVLink fabric", where, f"GPU {gpu.index}: {words}", "have the NVSwitches looked at")
    pairs = [(found.gpus[a].index, found.gpus[b].index) for a, b in unjoined_pairs(found.joined)]
    count = len(found.joined)
    if count <= 1:
        return
    if not pairs:
        fewest = min(found.joined[a][b] for a in range(count) for b in range(a))
        yield ok("NVLink", where, f"joins all {count} GPUs, {fewest} links between the two with the fewest")
    elif shards is not None and shards > 1:
        listed = ", ".join(f"{a}-{b}" for a, b in pairs[:6]) + (" …" if pairs[6:] else "")
        is_refused = require_nvlink and node.hosts_ranks and not has_joined(found.joined, shards)
        yield (fail if is_refused else warn)(
            "NVLink",
            where,
            f"GPUs {listed} are joined by PCIe only: all-reduces between them are many times slower",
            "set parallel.tensor_parallel_size to the GPUs that are joined and the rest as stages, or take a machine "
            "with NVSwitches; placement.require_nvlink refuses such stages",
        )


def _down(where: str, gpu: Gpu, found: NodeGpus, shards: int | None) -> Iterator[Finding]:
    """Links of a GPU that are down. Those of a card that nobody has bridged are, and are well."""
    down = [str(link) for link, is_up in enumerate(gpu.links) if not is_up]
    most = max(sum(other.links) for other in found.gpus if other.name == gpu.name)
    on_a_board = gpu.fabric_state in (1, 2, _FABRIC_DONE) or "SXM" in gpu.name
    if not down or (sum(gpu.links) == most and not on_a_board):
        return
    is_bare = not any(gpu.links) and not on_a_board  # its bridge has failed, or it has none while others have
    if not is_bare or (shards or 0) > 1:
        yield (warn if is_bare else fail)(
            "NVLink",
            where,
            f"GPU {gpu.index}: links {', '.join(down)} of {len(gpu.links)} are down",
            "`nvidia-smi nvlink -s`; restart nvidia-fabricmanager or reboot, seat a card's bridge anew; where it "
            "stays, have it repaired",
        )
