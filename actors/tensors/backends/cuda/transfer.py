"""Copies tensors between host and device without waiting: from pinned memory, and with an event on the way back."""

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
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def take(self) -> torch.Tensor:
        """Wait for this copy, but for nothing that was launched later → the tensor on the host."""
        self._event.synchronize()
        return self._on_host
