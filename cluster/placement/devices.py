"""Which CUDA device a rank uses, given what Ray assigned and what its process can see."""

import os

import ray


def cuda_index(assigned_id: str, visible: str | None) -> int:
    """Torch's index of the GPU that Ray calls `assigned_id`, in a process that sees all of its node's devices.

    Ray's ids are the entries of its node's CUDA_VISIBLE_DEVICES (physical numbers, or UUIDs of GPUs and MIG slices);
    torch counts in the order of that list, or in physical order where there is none. Raises ValueError.
    """
    if visible:
        listed = [part.strip() for part in visible.split(",")]
        if assigned_id in listed:
            return listed.index(assigned_id)
        raise ValueError(f"Ray assigned GPU {assigned_id}, but this process sees only {visible}")
    if not assigned_id.isdigit():
        raise ValueError(f"Ray assigned GPU {assigned_id}, and CUDA_VISIBLE_DEVICES of its node does not list it")
    return int(assigned_id)


def own_device() -> tuple[str, str | None]:
    """(The device of this actor: cpu, or cuda:<torch's index>; Ray's name of its GPU). Raises ValueError."""
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not gpus:
        return "cpu", None
    return f"cuda:{cuda_index(gpus[0], os.environ.get('CUDA_VISIBLE_DEVICES'))}", str(gpus[0])
