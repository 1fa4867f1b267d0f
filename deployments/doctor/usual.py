"""What all-reduces usually reach on well-known machines: bus bandwidth of large messages, as others measured it."""

_GB = 10**9
_ANY = 10**9
# (part of the GPU's name, whether NVLink joins the stage, shards up to, bytes a second); the first row that fits
_ALL_REDUCE = (
    # NVIDIA/nccl-tests#212, #272 and #290, NVIDIA/nccl#1455: 8 GPUs reach 460 to 480 as the switch adds, fewer 365
    ("H100", True, 4, 365 * _GB),
    ("H100", True, 8, 460 * _GB),
    ("H200", True, 4, 365 * _GB),
    ("H200", True, 8, 460 * _GB),
    # NVIDIA/nccl#1807: one report
    ("B200", True, 8, 830 * _GB),
    # NVIDIA/nccl-tests#149 and #178: 200 to 250
    ("A100", True, 8, 230 * _GB),
    # without a switch, by PCIe 5: 35 to 45
    ("H100", False, _ANY, 40 * _GB),
)


def usual_all_reduce(gpu: str, is_joined: bool, shards: int) -> int | None:
    """Bytes a second; None where we know of no figure."""
    for name, joined, most, rate in _ALL_REDUCE:
        if name in gpu and joined == is_joined and shards <= most:
            return rate
    return None
