"""How long work takes on a device, what the device can do at best, and the kernels behind a piece of work."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

NUM_KERNELS = 14  # of a step that are shown, by time


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bandwidth(device: torch.device) -> float:
    """Bytes a second: the best of copying (read and written) and of summing up (read only)."""
    num_bytes = 1 << (31 if device.type == "cuda" else 24)
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        best = max(best, 2 * num_bytes / seconds(device, lambda: target.copy_(source)))
        best = max(best, num_bytes / seconds(device, source.sum))
    return best


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the best of some."""
    size, repeats = (8192, 4) if device.type == "cuda" else (256, 1)
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def work() -> None:
        for _ in range(repeats):
            torch.mm(x, y)

    work()
    return 2 * size**3 * repeats / min(seconds(device, work) for _ in range(6))


def in_graph(device: torch.device, work: Callable[[], Any]) -> Callable[[], Any]:
    """The work as a CUDA graph, after a run that compiles what it needs; on a CPU the work itself."""
    work()
    if device.type != "cuda":
        return work
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def kernels(device: torch.device, work: Callable[[], Any], num_steps: int) -> tuple[list[dict[str, Any]], bool]:
    """The kernels of one of the `num_steps` steps that the work runs, by time; and whether graphs launched them.

    On a CPU the operators of torch.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        work()
        synchronize(device)
    events = found.key_averages()
    is_captured = any("GraphLaunch" in event.key for event in events)
    if device.type == "cuda":
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    taken = sorted(((_self_us(event, device), event) for event in events), key=lambda one: -one[0])
    rows = [
        {"kernel": event.key[:120], "calls": event.count / num_steps, "us": us / num_steps}
        for us, event in taken[:NUM_KERNELS]
    ]
    rest = sum(us for us, _ in taken[NUM_KERNELS:]) / num_steps
    return [*rows, {"kernel": "all others", "calls": None, "us": rest}], is_captured


def _self_us(event: Any, device: torch.device) -> float:
    return float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
