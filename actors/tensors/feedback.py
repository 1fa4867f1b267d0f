"""Sends the ids that the last stage samples back to the first, which needs them before the engine has seen them.

Both ends run the same steps in the same order, so that both know, without further messages, what is sent and when.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from actors.tensors.sequence_table import Row
from actors.words.messages import StepBatch
from cluster.collectives.interface import Link, Sending


class FeedbackSender:
    """The last stage's end: one message a step that samples, int64 [sampling entries]."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sendings: deque[tuple[int, Sending, torch.Tensor]] = deque()

    def catch_up(self, step: StepBatch) -> None:
        """Drop the sends that the first stage has received: of all steps whose results the engine had for this one.

        Waiting for a later one could take forever: the first stage may not be ready to receive it yet.
        """
        while self._sendings and self._sendings[0][0] <= step.seen:
            self._sendings.popleft()[1].wait()

    def send(self, step: StepBatch, ids_R: torch.Tensor) -> None:
        """Start to send the ids that a step sampled, if it sampled any."""
        if len(ids_R):
            self._sendings.append((step.step, self._link.send(ids_R), ids_R))


class FeedbackReceiver:
    """The first stage's end: knows which steps sample, and receives their ids when a step needs them."""

    def __init__(self, link: Link, device: torch.device, take: Callable[[Sequence[Row], torch.Tensor], object]) -> None:
        """`take` gets the rows of each step with the ids that it sampled, int64 on the device."""
        self._link = link
        self._take = take
        self._device = device
        self._due: deque[tuple[int, int, tuple[Row, ...]]] = deque()  # step, lane, the rows that it samples for

    def expect(self, step: StepBatch, rows: tuple[Row, ...]) -> None:
        """Note that a step, which samples for these rows, is on its way to the last stage."""
        if rows:
            self._due.append((step.step, step.lane, rows))

    def catch_up(self, step: StepBatch) -> None:
        """Receive the ids that this step builds on.

        These are of all steps whose results the engine had, and where an entry has no ids ("your last token"), of
        all earlier steps of its lane. A row may be closed by now: its id is received and dropped.
        """
        num = sum(due_step <= step.seen for due_step, _, _ in self._due)
        if any(not entry.ids for entry in step.entries):
            num = max([num, *(number for number, (_, lane, _) in enumerate(self._due, 1) if lane == step.lane)])
        for _ in range(num):
            rows = self._due.popleft()[2]
            ids_R = torch.empty(len(rows), dtype=torch.int64, device=self._device)
            self._link.receive(ids_R)
            self._take(rows, ids_R)
