"""What each accelerator can do: memory, and by its data sheet bandwidth, dense bf16 arithmetic and links."""

from dataclasses import dataclass

_GB, _MIB, _TFLOP = 10**9, 2**20, 10**12
_NIC = 50 * _GB  # bytes a second and direction between nodes: one 400 Gb/s port a GPU


@dataclass(frozen=True)
class Accelerator:
    """One device; rates are peaks."""

    name: str
    memory_bytes: int  # as nvidia-smi shows it, where that is known: it is not what the name says
    memory_bytes_per_s: int
    bf16_flop_per_s: int  # without sparsity
    link_bytes_per_s: int  # to its neighbors in the node, each direction
    nic_bytes_per_s: int = _NIC
    maps_neighbors: bool = True  # memory of the GPUs in its node: symmetric memory
    has_adding_switch: bool = False  # between the GPUs of its node: multicast


ACCELERATORS = {
    one.name: one
    for one in (
        # https://resources.nvidia.com/en-us-tensor-core (H100, H200), NVLink 4: 900 GB/s both ways.
        # Memory of H100, A100 and L40S: https://github.com/modal-labs/modal-client/pull/2797
        Accelerator("h100-80gb", 81559 * _MIB, 3350 * _GB, 989 * _TFLOP, 450 * _GB, has_adding_switch=True),
        Accelerator("h200", 141 * _GB, 4800 * _GB, 989 * _TFLOP, 450 * _GB, has_adding_switch=True),
        # https://www.nvidia.com/en-us/data-center/dgx-b200, NVLink 5: 1.8 TB/s both ways
        Accelerator("b200", 180 * _GB, 7700 * _GB, 2250 * _TFLOP, 900 * _GB, has_adding_switch=True),
        # https://www.nvidia.com/en-us/data-center/a100, NVLink 3: 600 GB/s both ways
        Accelerator("a100-80gb", 81920 * _MIB, 2039 * _GB, 312 * _TFLOP, 300 * _GB, 25 * _GB),
        Accelerator("a100-40gb", 40960 * _MIB, 1555 * _GB, 312 * _TFLOP, 300 * _GB, 25 * _GB),
        # https://www.nvidia.com/en-us/data-center/l40s, PCIe 4 x16
        Accelerator("l40s", 46068 * _MIB, 864 * _GB, 362 * _TFLOP, 32 * _GB, 25 * _GB, maps_neighbors=False),
        # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html, 7 links of 64 GB/s
        Accelerator("mi300x", 192 * _GB, 5300 * _GB, 1307 * _TFLOP, 448 * _GB),
    )
}
