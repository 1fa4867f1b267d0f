"""Begins a new epoch in a thread of its own, so that the engine can take and end requests meanwhile."""

import threading
from collections.abc import Callable
from functools import partial

from actors.words.errors import Verdict
from actors.words.executor import Revival, Revive


class Attempt:
    """One attempt to begin an epoch, in its own thread."""

    def __init__(
        self, revive: Revive, epoch: int, verdict: Verdict, is_fresh: bool, when_done: Callable[[], None]
    ) -> None:
        """Start it. `when_done` is called in its thread."""
        self._work: Callable[[], Revival] = partial(revive, epoch, verdict, is_fresh)
        self._when_done = when_done
        self._revival: Revival | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="revival", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `result` returns without waiting."""
        return self._revival is not None or self._error is not None

    def result(self) -> Revival:
        """Wait for the end of the attempt → the new executor. Raises what the attempt raised."""
        self._thread.join()
        if self._revival is None:
            assert self._error is not None
            raise self._error
        return self._revival

    def _run(self) -> None:
        try:
            self._revival = self._work()
        except Exception as error:  # noqa: BLE001 - raised again by `result`
            self._error = error
        self._when_done()
