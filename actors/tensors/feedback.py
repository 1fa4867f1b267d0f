"""Brings the ids that the last stage samples back to the first, which needs them before the engine has seen them.

Both ends run the same steps in the same order, so they agree without a word about what is sent and when it has come.
"""

from collections import deque

import torch

from actors.tensors.sequence_table import Row
from actors.words.messages import StepBatch
from cluster.collectives.interface import Link, Sending


class FeedbackSender:
    """The last stage's end: one message a step that samples, int64 [sampling entries]."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sendings: deque[tuple[int, Sending, torch.Tensor]] = deque()

    def before(self, step: StepBatch) -> None:
        """Let go of what the first stage has taken: that of all steps which this one's maker had seen the end of.

        Waiting for a later one could be for ever: the first stage may not want it yet.
        """
        while self._sendings and self._sendings[0][0] <= step.seen:
            self._sendings.popleft()[1].wait()

    def send(self, step: StepBatch, ids_R: torch.Tensor) -> None:
        """Start to send what a step sampled; nothing where it sampled nothing."""
        if len(ids_R):
            self._sendings.append((step.step, self._link.send(ids_R), ids_R))


class FeedbackReceiver:
    """The first stage's end: knows which steps sampled, and takes their ids when they are due."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link = link
        self._device = device
        self._due: deque[tuple[int, int, tuple[Row, ...]]] = deque()  # step, lane, what it sampled for

    def expect(self, step: StepBatch, rows: tuple[Row, ...]) -> None:
        """A step went on its way to the last stage that samples for these rows."""
        if rows:
            self._due.append((step.step, step.lane, rows))

    def before(self, step: StepBatch) -> None:
        """Take what this step builds on: all that its maker had seen, and what "your last token" stands for.

        A row may be closed by now; what comes for it is lost with it.
        """
        num = sum(number <= step.seen for number, _, _ in self._due)
        if any(not entry.ids for entry in step.entries):
            num = max([num, *(place for place, (_, lane, _) in enumerate(self._due, 1) if lane == step.lane)])
        for _ in range(num):
            rows = self._due.popleft()[2]
            ids_R = torch.empty(len(rows), dtype=torch.int64, device=self._device)
            self._link.receive(ids_R)
            for row, token_id in zip(rows, ids_R.tolist(), strict=True):
                row.ids.append(token_id)
