"""How GPUs sum a message over the shards of a stage: the methods, which one a message takes, about how long each takes.

The figures are measured ones for bfloat16 on one switch of H100s (vllm-project/vllm#24111, #24532 and #33839): a fixed
part, and bytes that cross a GPU's link.
"""

from dataclasses import dataclass
from typing import Literal

Method = Literal["one_shot", "two_shot", "multimem", "nccl"]

_MIB = 1024 * 1024
BUFFER_BYTES = 8 * _MIB  # of symmetric memory on each shard: the largest message that is summed in it
MOST_SHARDS = 8
# Up to so many bytes every shard reads all messages whole, by number of shards; with more shards others are faster
# sooner. At 1 MiB 4 shards take 15 µs in one shot, 18 in the switch or in two shots; 6 shards take 21, 16 and 17.
_ONE_SHOT_BYTES = {2: BUFFER_BYTES, **dict.fromkeys((3, 4), _MIB), **dict.fromkeys((5, 6), _MIB // 2)}
_ONE_SHOT_BYTES |= dict.fromkeys((7, 8), _MIB // 4)
_ALIGNMENT_BYTES = 16  # with less the kernels load less at once, or refuse
_FIXED_S = {"one_shot": 7e-6, "two_shot": 13e-6, "multimem": 11e-6, "nccl": 15e-6}


@dataclass(frozen=True)
class StageLinks:
    """What joins the GPUs of one stage."""

    num_shards: int
    has_symmetric_memory: bool  # each can map the others' memory
    has_multicast: bool  # and the switch between them can add


def method_for(num_bytes: int, links: StageLinks) -> Method:
    """The method by which a contiguous message in bfloat16 or float32 is summed."""
    is_aligned = num_bytes % _ALIGNMENT_BYTES == 0
    if not links.has_symmetric_memory or not 0 < num_bytes <= BUFFER_BYTES or not is_aligned:
        return "nccl"
    if num_bytes <= _ONE_SHOT_BYTES.get(links.num_shards, 0):
        return "one_shot"
    return "multimem" if links.has_multicast else "two_shot"


def all_reduce_s(num_bytes: int, links: StageLinks, link_bytes_per_s: float) -> float:
    """About how many seconds it takes inside a CUDA graph, by `link_bytes_per_s` of each GPU in each direction."""
    method, num_others = method_for(num_bytes, links), links.num_shards - 1
    shares = {"one_shot": float(num_others), "two_shot": 2.0, "multimem": 2.0, "nccl": 2.0}
    if method != "one_shot":
        shares[method] *= num_others / links.num_shards
    return _FIXED_S[method] + num_bytes * shares[method] / link_bytes_per_s
