"""The engine: one thread that feeds an executor with steps and turns results into events.

It waits on the executor only, which anybody may wake, and no longer than to the next deadline of a request: no timer
and no poll stands between a result and its events.
When the executor fails, requests wait until another epoch has begun, and are computed again from their ids.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from actors.decisions.failure.quarantine import Quarantine
from actors.decisions.schedule.deadlines import Deadlines
from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.sequence import completed
from actors.decisions.schedule.settings import SchedulerSettings
from actors.decisions.schedule.stats import Stats
from actors.remote.revival import Attempt
from actors.words.errors import EngineStopped, GangFailure, GangLost, IntegrityError, Verdict
from actors.words.executor import Executor, Revival, Revive
from actors.words.messages import Event, FinishReason, Request

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "recovering", "failed", "stopped"]

_MAX_ATTEMPTS = 3  # to begin one epoch; the last one with every rank anew
_MAX_VAIN_EPOCHS = 8  # in a row, in which no running request gained an id
_NUM_REJOINED = 3  # vain epochs in a row after which no rank is trusted that lived through them
_CHECK_EVERY_S = 10.0  # a check reads all weights: no request may ask for more of them


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
        num_blocks: int,
        deliver: Callable[[list[Event]], None],
        revive: Revive | None = None,
    ) -> None:
        """`deliver` is called in the engine's thread with all events of a step (none: a new state); it must not block.

        `num_blocks`: of the KV cache of every rank. `revive` makes an executor for another epoch when one failed;
        without it a failure is the end.
        """
        self._executor = executor
        self.stats = Stats()
        self._scheduler = Scheduler(settings, num_blocks, self.stats)
        self._deliver = deliver
        self._revive = revive
        self._deadlines = Deadlines()  # of every epoch
        self._quarantine = Quarantine()
        self._num_vain_epochs = 0
        self._to_replay: set[str] = set()  # what ran when the last epoch ended, and has gained nothing since
        self._replay_began = 0.0
        self._checked_at = float("-inf")
        self._bell = threading.Event()  # rung for commands and attempts, while there is no executor to wake
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
        request = completed(request)
        self._command(lambda: self._add(request))

    def finish(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request: it is aborted, or has said a stop string ("stop"). Ignores unknown ids."""
        with contextlib.suppress(EngineStopped):  # its terminal event is out already
            self._command(lambda: [event for event in [self._scheduler.finish(request_id, reason)] if event])

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
    def state(self) -> EngineState:
        """Any thread."""
        return self._state

    @property
    def failure(self) -> str:
        """Why the engine last failed; empty while it has not."""
        return self._failure

    def close(self) -> None:
        """End every request, the thread and the executor. May be called twice."""
        with self._lock:
            self._state = "stopped"
        self._ring()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._executor.close()

    def _command(self, command: Callable[[], list[Event]]) -> None:
        with self._lock:
            if self._state not in ("ready", "recovering"):
                raise EngineStopped(self._failure or f"the engine is {self._state}")
            self._commands.append(command)
        self._ring()

    def _ring(self) -> None:
        self._executor.wake()
        self._bell.set()

    def _add(self, request: Request) -> list[Event]:
        try:
            self._scheduler.add(request)
        except ValueError as error:
            self.stats.num_finished["error"] += 1
            return [Event(request.request_id, [], "error", str(error))]
        except Exception:  # whatever it is about, it is about this request only
            logger.exception("request %s cannot be queued", request.request_id)
            self.stats.num_finished["error"] += 1
            return [Event(request.request_id, [], "error", "internal error of the engine")]
        if request.deadline is not None:
            self._deadlines.add(request.request_id, request.deadline)
        return []

    def _run(self) -> None:
        try:
            while verdict := self._serve():
                logger.error("epoch %d ends (%s): %s", self._scheduler.epoch, verdict.cause, verdict.reason)
                self._recover(verdict)
            self._end_all("stopped", "the server is shutting down")
        except GangFailure as failure:
            self._end_all("failed", str(failure))
        except Exception:
            logger.exception("the engine failed")
            self._end_all("failed", "internal error of the engine")

    def _serve(self) -> Verdict | None:
        """Turn after turn until the gang fails (why) or the engine is closed (nothing)."""
        try:
            while self._state == "ready":
                self._turn()
        except GangFailure as failure:
            return failure.verdict
        except IntegrityError as failure:
            return Verdict("accounting", str(failure))
        return None

    def _turn(self) -> None:
        """Wait, then hand the lanes their next steps before anybody hears of the results: the ranks go on meanwhile."""
        events: list[Event] = []
        try:
            for result in self._executor.wait(self._deadlines.seconds_left(time.monotonic())):
                events += self._scheduler.complete(result)
            events += self._take_commands()
            while step := self._scheduler.next_step():
                self._executor.submit(step)
        finally:  # what a request has gained is told, whatever becomes of the gang
            if events:
                self._deliver(events)
        if events:
            self._note(events)
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

    def _note(self, events: list[Event]) -> None:
        """What events say of the gang: it makes progress, it has caught up, it computes what is no number."""
        if any(event.token_ids for event in events):
            self._num_vain_epochs = 0
        if self._to_replay:
            self._to_replay -= {event.request_id for event in events if event.token_ids or event.finish_reason}
            if not self._to_replay:
                self.stats.recovery_s["replay"] += time.monotonic() - self._replay_began
        is_odd = any(event.code == "numerical_error" for event in events)
        if is_odd and time.monotonic() - self._checked_at > _CHECK_EVERY_S:
            self._checked_at = time.monotonic()
            self._executor.check()

    def _recover(self, verdict: Verdict) -> None:
        """Another epoch, in which everything that lives goes on. Raises GangFailure when there is none to be had."""
        with self._lock:
            if self._state == "ready":
                self._state = "recovering"
            self._failure = verdict.reason
        self._deliver([])
        self._num_vain_epochs += self._scheduler.num_in_flight > 0
        places = self._scheduler.begin_epoch()
        self._to_replay = {name for step in places.values() for name in step} & set(self._scheduler.num_ids)
        revival = self._begin_epoch(verdict)
        if revival is None:
            return
        events = self._judge(revival.verdict, places)
        self.stats.num_rebuilds[revival.verdict.cause] += 1
        for phase, seconds in revival.seconds.items():
            self.stats.recovery_s[phase] += seconds
        self._replay_began = time.monotonic()
        with self._lock:
            if self._state == "recovering":
                self._state = "ready"
        self._executor.wake()  # the first turn submits what waits
        self._deliver(events)
        self._deliver([])

    def _begin_epoch(self, verdict: Verdict) -> Revival | None:
        """Try to come back; requests come and go meanwhile. None: the engine was closed. Raises GangFailure."""
        error = verdict.reason
        for attempt in range(_MAX_ATTEMPTS):
            if self._revive is None or self._state != "recovering" or self._num_vain_epochs > _MAX_VAIN_EPOCHS:
                break
            if attempt:
                self._scheduler.epoch += 1  # nothing has run since the last one began
            is_fresh = attempt == _MAX_ATTEMPTS - 1 or self._num_vain_epochs > _NUM_REJOINED
            going = Attempt(self._revive, self._scheduler.epoch, verdict, is_fresh, self._bell.set)
            self._wait_for(going)
            try:
                revival = going.result()
            except Exception as failure:  # whatever it is, the next try may not meet it
                logger.exception("the gang did not come back")
                error = f"the gang did not come back: {failure}"
                if isinstance(failure, GangLost):
                    break
                continue
            finally:
                self._executor.close()
            self._executor = revival.executor
            return revival
        if self._state == "recovering":
            raise GangFailure(error)
        return None

    def _wait_for(self, attempt: Attempt) -> None:
        """Meanwhile new requests queue up, and those that are given up end."""
        while not attempt.is_done:
            self._bell.wait(self._deadlines.seconds_left(time.monotonic()))
            self._bell.clear()
            if events := self._take_commands():
                self._deliver(events)

    def _judge(self, verdict: Verdict, places: dict[int, dict[str, int]]) -> list[Event]:
        """Who was in the culprit's step may have to run alone, and fails when it ended its rank so."""
        if not verdict.is_from_within:
            return []
        guilty = self._quarantine.death(places.get(verdict.step, {}), self._scheduler.num_ids)
        self._scheduler.suspect(self._quarantine.suspects)
        if guilty is None:
            return []
        logger.error("request %s ends ranks: it fails, and nothing else", guilty)
        return [self._scheduler.fail(guilty, "it repeatedly ended the ranks that computed it", "ends_ranks")]

    def _take_commands(self) -> list[Event]:
        events: list[Event] = []
        while self._commands:
            events += self._commands.popleft()()
        late = self._deadlines.take_expired(time.monotonic())
        return events + [event for name in late if (event := self._scheduler.finish(name, reason="timeout"))]
