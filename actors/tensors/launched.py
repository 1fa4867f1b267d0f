"""Steps that were launched, and their results: available now, or once the sampled ids have reached the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.tensors.backend import Download
from actors.tensors.sequence_table import Row
from actors.words.messages import TokenLogprobs


@dataclass(frozen=True)
class Sampled:
    """The results of a step, each list in the order of the entries; see StepResult."""

    token_ids: list[list[int]]  # of the entries that sample
    logprobs: list[list[TokenLogprobs]]  # as `token_ids`; an empty list if no entry wants them
    prompt_logprobs: list[list[TokenLogprobs]]  # of the entries that want them


class Launched(Protocol):
    """A step that was launched, and its results."""

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""

    def take(self) -> Sampled | None:
        """Wait → the results of the step, on every shard of the last stage; None on the other stages."""


@dataclass(frozen=True)
class Done:
    """A step that samples nothing here; see Launched."""

    result: Sampled | None

    def is_ready(self) -> bool:
        """True: there is nothing to wait for."""
        return True

    def take(self) -> Sampled | None:
        """The results of the step."""
        return self.result


class PendingSample:
    """A step whose sampled ids are on their way to the host; see Launched."""

    def __init__(self, rows: Sequence[Row], ids: Download, sampled: Sampled) -> None:
        """`sampled` has everything but the ids."""
        self._rows = [(row, len(row.ids)) for row in rows]
        self._ids = ids
        self._sampled = sampled
        self._is_taken = False
        for row in rows:
            row.ids.append(0)  # a placeholder until the id is known

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return self._is_taken or self._ids.is_ready()

    def take(self) -> Sampled:
        """Wait for the ids, and write them into their rows."""
        if not self._is_taken:
            ids = self._ids.take().tolist()
            for (row, index), token_id in zip(self._rows, ids, strict=True):
                if index < len(row.ids):  # else a later step has cut the row back, to compute it anew
                    row.ids[index] = max(0, token_id)
            self._sampled.token_ids.extend([token_id] for token_id in ids)
            self._is_taken = True
        return self._sampled
