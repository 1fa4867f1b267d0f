"""Steps that were launched, and their results: available now, or once they have reached the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

from actors.tensors.backend import Download
from actors.tensors.sampled_ids import UNKNOWN_ID
from actors.tensors.sampling.grammar_masks import NO_MASK_YET
from actors.tensors.sampling.logprobs import LogprobDownload
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


class PendingIds:
    """Sampled ids on their way to the host; their rows hold UNKNOWN_ID meanwhile."""

    def __init__(self, rows: Sequence[Row], ids: Download) -> None:
        self._rows = [(row, len(row.ids)) for row in rows]
        self._download = ids
        self._ids: list[int] | None = None
        for row in rows:
            row.ids.append(UNKNOWN_ID)

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return self._ids is not None or self._download.is_ready()

    def take(self) -> list[int]:
        """Wait for the ids, and write them into their rows."""
        if self._ids is None:
            self._ids = self._download.take().tolist()
            for (row, index), token_id in zip(self._rows, self._ids, strict=True):
                if index < len(row.ids):  # else a later step has cut the row back, to compute it anew
                    row.ids[index] = max(0, token_id)
        return self._ids


class PendingLogprobs(NamedTuple):
    """Log-probabilities on their way to the host."""

    download: LogprobDownload | None  # None: there are none
    counts: list[int]  # how many belong to each entry, one after the other

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return self.download is None or self.download.is_ready()

    def take(self) -> list[list[TokenLogprobs]]:
        """Wait → those of each entry."""
        read = iter([] if self.download is None else self.download.take())
        return [list(islice(read, count)) for count in self.counts]


class PendingStep:
    """A step whose results are on their way to the host; see Launched."""

    def __init__(
        self, ids: PendingIds, logprobs: PendingLogprobs | None, prompt_logprobs: PendingLogprobs | None
    ) -> None:
        """Log-probabilities are None where no entry wants them."""
        self._ids = ids
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self._result: Sampled | None = None

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        if self._result is not None:
            return True
        pending = [part for part in (self._logprobs, self._prompt_logprobs) if part is not None]
        return self._ids.is_ready() and all(part.is_ready() for part in pending)

    def take(self) -> Sampled:
        """Wait → the results of the step."""
        if self._result is None:
            ids = [[] if token_id == NO_MASK_YET else [token_id] for token_id in self._ids.take()]
            logprobs, of_prompt = (
                [] if part is None else part.take() for part in (self._logprobs, self._prompt_logprobs)
            )
            self._result = Sampled(ids, logprobs, of_prompt)
        return self._result
