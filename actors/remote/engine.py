"""The engine: one thread that feeds an executor with steps and turns results into events.

It waits on the executor only, which anybody may wake: no timer and no poll stands between a result and its events.
"""

import contextlib
import dataclasses
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from actors.decisions.scheduler import Scheduler, SchedulerSettings
from actors.decisions.stats import Stats
from actors.words.errors import EngineStopped, GangFailure, IntegrityError
from actors.words.executor import Executor
from actors.words.messages import Event, Request

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "recovering", "failed", "stopped"]

_MAX_VAIN_REVIVALS = 3  # in a row, without a step that succeeded between them


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What `/cluster` shows of the engine. Taken without a lock: the numbers may be a step apart."""

    state: EngineState
    epoch: int
    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int


class Engine:
    """Owns the scheduler and the executor; speaks token ids. Commands come from any thread, events go to `deliver`."""

    def __init__(
        self,
        executor: Executor,
        settings: SchedulerSettings,
        deliver: Callable[[list[Event]], None],
        revive: Callable[[int], Executor] | None = None,
    ) -> None:
        """`deliver` is called in the engine's thread with all events of a step; it must not block.

        `revive` makes an executor for a new epoch when the old one failed; without it a failure is the end.
        """
        self._executor = executor
        self._settings = settings
        self.stats = Stats()
        self._scheduler = Scheduler(settings, epoch=0, stats=self.stats)
        self._deliver = deliver
        self._revive = revive
        self._num_vain_revivals = 0
        self._commands: deque[Callable[[], list[Event]]] = deque()
        self._state: EngineState = "starting"
        self._failure = ""
        self._lock = threading.Lock()  # over the state: a command is either taken or refused, never left unanswered
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._state = "ready"
        self._thread.start()

    def add(self, request: Request) -> None:
        """Take a request; its events follow, the last one with a finish reason. Raises EngineStopped."""
        request = _completed(request)
        self._command(lambda: self._add(request))

    def finish(self, request_id: str, at_token: int | None = None) -> None:
        """End a request: after `at_token` generated ids (a stop string was found), or aborted. Ignores unknown ids."""
        with contextlib.suppress(EngineStopped):  # its terminal event is out already
            self._command(lambda: [event for event in [self._scheduler.finish(request_id, at_token)] if event])

    def snapshot(self) -> Snapshot:
        """Any thread."""
        counts = self._scheduler.counts()
        return Snapshot(
            self._state,
            self._scheduler.epoch,
            self._scheduler.num_running,
            self._scheduler.num_waiting + len(self._commands),
            counts.total,
            counts.used,
            counts.cached,
        )

    @property
    def failure(self) -> str:
        """Why the engine last failed; empty while it has not."""
        return self._failure

    def close(self) -> None:
        """End every request, the thread and the executor. May be called twice."""
        with self._lock:
            self._state = "stopped"
        self._executor.wake()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._executor.close()

    def _command(self, command: Callable[[], list[Event]]) -> None:
        with self._lock:
            if self._state != "ready":
                raise EngineStopped(self._failure or f"the engine is {self._state}")
            self._commands.append(command)
        self._executor.wake()

    def _add(self, request: Request) -> list[Event]:
        try:
            self._scheduler.add(request)
        except ValueError as error:
            self.stats.num_finished["error"] += 1
            return [Event(request.request_id, [], "error", str(error))]
        return []

    def _run(self) -> None:
        try:
            while failure := self._serve():
                logger.error("epoch %d ends: %s", self._scheduler.epoch, failure)
                self._end_all("recovering", failure)
                self._begin_anew(failure)
            self._end_all("stopped", "the server is shutting down")
        except GangFailure as failure:
            self._end_all("failed", str(failure))
        except Exception:
            logger.exception("the engine failed")
            self._end_all("failed", "internal error of the engine")

    def _serve(self) -> str:
        """Turn after turn until the gang fails (why) or the engine is closed (nothing)."""
        try:
            while self._state == "ready":
                self._turn()
        except (GangFailure, IntegrityError) as failure:
            return str(failure)
        return ""

    def _turn(self) -> None:
        """Wait, then hand the lanes their next steps before anybody hears of the results: the ranks go on meanwhile."""
        events: list[Event] = []
        for result in self._executor.wait():
            events += self._scheduler.complete(result)
            self._num_vain_revivals = 0
        events += self._take_commands()
        while step := self._scheduler.next_step():
            self._executor.submit(step)
        if events:
            self._deliver(events)
            if not self._scheduler.num_live:
                self._scheduler.check()

    def _end_all(self, state: EngineState, error: str) -> None:
        """Every request hears of it, and new ones are refused from now on."""
        with self._lock:
            if self._state != "stopped":
                self._state = state
            self._failure = error
            events = self._take_commands()
        self._deliver(events + self._scheduler.fail_all(error))

    def _begin_anew(self, failure: str) -> None:
        """A new executor for the next epoch. Raises GangFailure when there is none to be had."""
        self._executor.close()
        while self._revive is not None and self._num_vain_revivals < _MAX_VAIN_REVIVALS and self._state == "recovering":
            self._num_vain_revivals += 1
            self._scheduler = Scheduler(self._settings, self._scheduler.epoch + 1, self.stats)
            try:
                self._executor = self._revive(self._scheduler.epoch)
            except Exception as error:  # whatever it is, the next try may not meet it
                logger.exception("the gang did not come back")
                failure = f"the gang did not come back: {error}"
                continue
            with self._lock:
                if self._state == "recovering":
                    self._state = "ready"
            return
        if self._state == "recovering":
            raise GangFailure(failure)

    def _take_commands(self) -> list[Event]:
        events: list[Event] = []
        while self._commands:
            events += self._commands.popleft()()
        return events


def _completed(request: Request) -> Request:
    """With what a replay needs: a seed where it draws, and the ids that min_tokens forbids."""
    sampling = request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
    if sampling.min_tokens > 0:
        sampling = msgspec.structs.replace(sampling, banned_ids=sorted(request.stop_token_ids))
    return msgspec.structs.replace(request, sampling=sampling)
