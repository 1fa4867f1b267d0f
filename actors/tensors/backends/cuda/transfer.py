"""Copies tensors between host and device without waiting, from and to pinned memory; events say when a copy ended."""

import torch


def to_device(on_host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting; on CPU the tensor itself.

    From memory that is not pinned, CUDA may wait for the stream. The pinned copy returns to torch's pool of pinned
    memory, which reuses it only after the device has read it.
    """
    if device.type != "cuda" or not on_host.numel():
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


class EventDownload:
    """A copy to pinned memory of the host, in progress; see Download."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._on_host.copy_(tensor, non_blocking=True)
        self._event = _new_event()
        self._event.record()

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def take(self) -> torch.Tensor:
        """Wait for this copy, but for nothing that was launched later → the tensor on the host."""
        self._event.synchronize()
        return self._on_host


class StagingRing:
    """Pinned buffers (int32) of the host, filled and sent in turn: none is written to while a copy reads it."""

    def __init__(self, size: int, num_buffers: int, device: torch.device) -> None:
        """With a buffer more than there are steps in flight, `next` does not wait."""
        has_events = device.type == "cuda"
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=has_events) for _ in range(num_buffers)]
        self._events = [_new_event() if has_events else None for _ in range(num_buffers)]
        self._at = 0

    def next(self) -> torch.Tensor:
        """The next buffer, to be filled; waits while its last copy has not ended."""
        self._at = (self._at + 1) % len(self._buffers)
        if (event := self._events[self._at]) is not None:
            event.synchronize()
        return self._buffers[self._at]

    def send(self, target: torch.Tensor, part: slice) -> None:
        """Start to copy a part of the buffer that was filled last into the same part of `target`."""
        target[part].copy_(self._buffers[self._at][part], non_blocking=True)
        if (event := self._events[self._at]) is not None:
            event.record()


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
