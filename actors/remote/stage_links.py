"""What a gang makes of the NVLinks of a stage: which GPU each shard takes, and what is said of pairs without one."""

from collections.abc import Sequence

from cluster.placement.nvlink import Joined, order_along_links, unjoined_pairs


def along_links(devices: Sequence[str], joined: Joined) -> list[str]:
    """The devices of a stage in the order of its shards: along the NVLinks between them."""
    return [devices[index] for index in order_along_links(joined)]


def refuse_unknown(stage: int, node: str, why: str) -> None:
    """Raises ValueError: placement.require_nvlink asks for what nobody can say of this stage."""
    raise ValueError(
        f"placement.require_nvlink: stage {stage}: on node {node} {why}, so nobody knows what joins its shards; unset "
        "it, or choose nodes with NVIDIA GPUs and a driver that is well (`stagemesh doctor` shows it)"
    )


def slow_pairs(stage: int, devices: Sequence[str], node: str, joined: Joined, is_required: bool) -> str | None:
    """What to say of a stage some of whose GPUs only PCIe joins; None where NVLink joins all.

    Raises ValueError where that is required (placement.require_nvlink).
    """
    pairs = unjoined_pairs(joined)
    if not pairs:
        return None
    listed = ", ".join(f"{devices[a]} and {devices[b]}" for a, b in pairs[:4]) + (" …" if pairs[4:] else "")
    words = f"stage {stage}: on node {node} no NVLink joins {listed}"
    remedy = (
        "set parallel.tensor_parallel_size to the number of GPUs that are joined, and make the rest stages; or choose "
        "other nodes by placement.label_selector; `stagemesh doctor` shows all links"
    )
    if is_required:
        raise ValueError(f"placement.require_nvlink: {words}; {remedy}; or unset it, for slower all-reduces")
    return f"{words}: all-reduces are slower; {remedy}"
