"""Reads from NVML what the GPUs of this node are, how they are, and what joins them. Allocates nothing on any."""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray._private.thirdparty.pynvml as pynvml  # not public, but always there, and as new as the pinned Ray

logger = logging.getLogger(__name__)

_MOST_LINKS = 18  # of one GPU


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML describes it; None: it does not say."""

    index: int  # NVML's, which is the order of PCI addresses
    uuid: str
    name: str
    used_bytes: int
    pids: tuple[int, ...]  # of processes that compute on it, as the host counts them
    uncorrected_errors: int | None  # of its memory, since the driver was loaded
    remap_pending: bool | None  # a row of its memory is replaced at the next reset
    remap_failed: bool | None  # no row is left to replace a faulty one
    recovery_action: int | None  # what the driver asks for; 0: nothing
    slowdowns: int | None  # bits: why its clocks are lower than they might be
    pcie_width: int | None
    most_pcie_width: int | None
    is_split: bool | None  # MIG
    compute_mode: int | None
    links: tuple[bool, ...]  # by NVLink: whether it is up
    fabric_state: int | None  # of the NVSwitches' fabric; 3: complete
    fabric_health: int | None  # bits; 0: it does not say


@dataclass(frozen=True)
class NodeGpus:
    """All GPUs of a node that answer, and how many NVLinks join each two of them."""

    driver: str
    gpus: tuple[Gpu, ...]
    # [gpu][gpu], as in `gpus`; 0: PCIe only. Through a switch: those of the one with fewer. Empty: they do not say
    joined: tuple[tuple[int, ...], ...]
    troubles: tuple[str, ...] = ()  # what NVML said instead of an answer, of each GPU or of the driver


def read_gpus() -> NodeGpus | None:
    """The GPUs of this node, each read on its own; None where there is no NVIDIA driver."""
    try:
        with _nvml() as is_there:
            return _read_all() if is_there else None
    except pynvml.NVMLError as error:
        return NodeGpus("", (), (), (f"the driver: {error}",))


def links_between(assigned_ids: Sequence[str]) -> tuple[tuple[int, ...], ...] | None:
    """NVLinks between each two of the GPUs that Ray calls so; None where NVML is not there, or does not say."""
    try:
        with _nvml() as is_there:
            handles = [_ask(_handle, one) for one in assigned_ids] if is_there else [None]
            return None if None in handles else _joined(handles)
    except pynvml.NVMLError as error:
        logger.warning("NVML does not say what joins GPUs %s: %s", ", ".join(assigned_ids), error)
        return None


@contextmanager
def _nvml() -> Iterator[bool]:
    """Whether NVML is there; it is released at the end. Raises NVMLError."""
    missing = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value not in missing:
            raise
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _handle(assigned_id: str) -> Any:
    if assigned_id.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(assigned_id))
    return pynvml.nvmlDeviceGetHandleByUUID(assigned_id)


def _read_all() -> NodeGpus:
    gpus, handles, troubles = list[Gpu](), list[Any](), list[str]()
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:  # else it is another container's
                gpus.append(_read(index, handle))
                handles.append(handle)
        except pynvml.NVMLError as error:
            troubles.append(f"GPU {index}: {error}")
    joined: tuple[tuple[int, ...], ...] = ()
    try:
        joined = _joined(handles)
    except pynvml.NVMLError as error:
        troubles.append(f"the NVLinks: {error}")
    return NodeGpus(_text(pynvml.nvmlSystemGetDriverVersion()), tuple(gpus), joined, tuple(troubles))


def _read(index: int, handle: Any) -> Gpu:
    remapped = _ask(pynvml.nvmlDeviceGetRemappedRows, handle)  # corrected, uncorrected, pending, failed
    kinds = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    mig, fabric = _ask(pynvml.nvmlDeviceGetMigMode, handle), _ask(_fabric, handle)
    processes = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        used_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        pids=tuple(int(one.pid) for one in processes),
        uncorrected_errors=_ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, *kinds),
        remap_pending=None if remapped is None else bool(remapped[2]),
        remap_failed=None if remapped is None else bool(remapped[3]),
        recovery_action=_ask(_recovery_action, handle),
        slowdowns=_ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
        pcie_width=_ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        most_pcie_width=_ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        is_split=None if mig is None else bool(mig[0]),
        compute_mode=_ask(pynvml.nvmlDeviceGetComputeMode, handle),
        links=tuple(bool(state) for _, state in _links(handle)),
        fabric_state=None if fabric is None else fabric[0],
        fabric_health=None if fabric is None else fabric[1],
    )


def _links(handle: Any) -> list[tuple[int, int]]:
    """(link, whether it is up) of the NVLinks that a GPU has."""
    states = [(link, _ask(pynvml.nvmlDeviceGetNvLinkState, handle, link)) for link in range(_MOST_LINKS)]
    return [(link, state) for link, state in states if state is not None]


def _joined(handles: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    buses = [_text(pynvml.nvmlDeviceGetPciInfo(handle).busId) for handle in handles]
    ends = [_far_ends(handle) for handle in handles]
    size = range(len(handles))
    return tuple(
        tuple(0 if a == b or not _is_nvlink(handles[a], handles[b]) else _count(ends, buses, a, b) for b in size)
        for a in size
    )


def _far_ends(handle: Any) -> list[str]:
    """What each link that is up leads to: the bus id of a GPU, or an empty text for a switch."""
    ends = []
    for link, is_up in _links(handle):
        if is_up:
            kind = _ask(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
            remote = _ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            is_gpu = kind == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU and remote is not None
            ends.append(_text(remote.busId) if is_gpu else "")
    return ends


def _count(ends: Sequence[Sequence[str]], buses: Sequence[str], a: int, b: int) -> int:
    direct = ends[a].count(buses[b])
    return direct or max(1, min(ends[a].count(""), ends[b].count("")))  # NVML says that they are joined


def _is_nvlink(one: Any, other: Any) -> bool:
    status = _ask(pynvml.nvmlDeviceGetP2PStatus, one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    return bool(status == pynvml.NVML_P2P_STATUS_OK)


def _recovery_action(handle: Any) -> int | None:
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    return int(value.value.uiVal) if value.nvmlReturn == pynvml.NVML_SUCCESS else None


def _fabric(handle: Any) -> tuple[int, int]:
    """(state, health). Older drivers know the second version only."""
    try:
        info = pynvml.c_nvmlGpuFabricInfo_v3_t()
        pynvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    except pynvml.NVMLError:
        info = pynvml.c_nvmlGpuFabricInfo_v2_t()
        pynvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    return int(info.state), int(info.healthMask)


def _ask(question: Callable[..., Any], *args: Any) -> Any:
    """NVML's answer; None where a GPU, a driver or a version of NVML does not know it."""
    unknown = (
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_NOT_FOUND,
    )
    try:
        return question(*args)
    except pynvml.NVMLError as error:
        if error.value in unknown:
            return None
        raise


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
