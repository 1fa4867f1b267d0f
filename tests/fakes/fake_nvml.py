"""NVML in plain data: machines whose answers were written down from NVIDIA's documentation of each call, not recorded.

What a machine is not told to answer is "not supported", as by a real driver.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray._private.thirdparty.pynvml as pynvml

GIB = 1 << 30
FABRIC_HEALTHY = 2 | 2 << 2 | 2 << 4 | 2 << 6 | 1 << 8  # each trouble: no
H100 = "NVIDIA H100 80GB HBM3"


@dataclass
class FakeGpu:
    """What one GPU answers; links: what each leads to (another GPU's index, or -1: a switch), None: it is down."""

    index: int
    name: str = H100
    used_bytes: int = 600 << 20
    pids: tuple[int, ...] = ()
    uncorrected_errors: int = 0
    remapped: tuple[int, int, int, int] = (0, 0, 0, 0)
    recovery_action: int = 0
    slowdowns: int = 0
    pcie_width: int = 16
    mig: bool = False
    compute_mode: int = 0
    links: list[int | None] = field(default_factory=lambda: [-1] * 18)
    fabric: tuple[int, int] | None = (3, FABRIC_HEALTHY)
    error: int | None = None  # of everything that it is asked

    @property
    def bus_id(self) -> str:
        return f"00000000:{0x19 + self.index * 0x10:02X}:00.0"


class FakeNvml:
    """Stands in for the module `pynvml`: functions answer for `gpus`, constants and structures are the real ones."""

    def __init__(self, gpus: list[FakeGpu], error: int | None = None) -> None:
        self.gpus, self.error = gpus, error
        self.is_open = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(pynvml, name)
        if name.startswith("nvml") and callable(value) and not isinstance(value, type):
            return self._not_supported
        return value

    def _not_supported(self, *_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlInit(self) -> None:
        if self.error is not None:
            raise pynvml.NVMLError(self.error)
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if index >= len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if self.gpus[index].error is not None:
            raise pynvml.NVMLError(self.gpus[index].error)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        for gpu in self.gpus:
            if self.nvmlDeviceGetUUID(gpu) == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return f"GPU-{gpu.index:08d}"

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(busId=gpu.bus_id)

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(total=80 * GIB, used=gpu.used_bytes)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in gpu.pids]

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, kind: int, counter: int) -> int:
        assert (kind, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        return gpu.uncorrected_errors

    def nvmlDeviceGetRemappedRows(self, gpu: FakeGpu) -> tuple[int, int, int, int]:
        return gpu.remapped

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[int]) -> list[Any]:
        assert fields == [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=gpu.recovery_action))]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu) -> int:
        return gpu.slowdowns

    def nvmlDeviceGetCurrPcieLinkWidth(self, gpu: FakeGpu) -> int:
        return gpu.pcie_width

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu: FakeGpu) -> int:
        return 16

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        return [int(gpu.mig), int(gpu.mig)]

    def nvmlDeviceGetComputeMode(self, gpu: FakeGpu) -> int:
        return gpu.compute_mode

    def _link(self, gpu: FakeGpu, link: int) -> int | None:
        if link >= len(gpu.links):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return gpu.links[link]

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:
        return int(self._link(gpu, link) is not None)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu: FakeGpu, link: int) -> int:
        is_switch = self._link(gpu, link) == -1
        return int(pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH if is_switch else pynvml.NVML_NVLINK_DEVICE_TYPE_GPU)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: FakeGpu, link: int) -> Any:
        far = self._link(gpu, link)
        if far is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(busId="00000000:05:00.0" if far == -1 else self.gpus[far].bus_id)

    def nvmlDeviceGetP2PStatus(self, one: FakeGpu, other: FakeGpu, index: int) -> int:
        assert index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        direct = other.index in one.links
        is_joined = direct or (-1 in one.links and -1 in other.links)
        return int(pynvml.NVML_P2P_STATUS_OK if is_joined else pynvml.NVML_P2P_STATUS_IOH_TOPOLOGY_NOT_SUPPORTED)

    def nvmlDeviceGetGpuFabricInfoV(self, gpu: FakeGpu, info: Any) -> None:
        if gpu.fabric is None:
            self._not_supported()
        filled = info._obj  # what ctypes' byref refers to
        filled.state, filled.healthMask = gpu.fabric


def hgx() -> list[FakeGpu]:
    """Eight H100 SXM, joined by switches, all well."""
    return [FakeGpu(index) for index in range(8)]


def pcie(count: int) -> list[FakeGpu]:
    """Cards that only PCIe joins."""
    return [FakeGpu(index, name="NVIDIA L40S", links=[], fabric=None) for index in range(count)]


def bridged(*pairs: tuple[int, int]) -> list[FakeGpu]:
    """Cards of which each two in `pairs` have a bridge of four links; the links for other bridges are down."""
    gpus = bare(2 * len(pairs))
    for a, b in pairs:
        gpus[a].links, gpus[b].links = [b] * 4 + [None] * 8, [a] * 4 + [None] * 8
    return gpus


def bare(count: int) -> list[FakeGpu]:
    """Cards that have links, and no bridge between them."""
    return [FakeGpu(n, name="NVIDIA A100 80GB PCIe", links=[None] * 12, fabric=None) for n in range(count)]
