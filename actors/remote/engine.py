"""The engine: one thread that submits steps to an executor and turns results into events.

It waits only on the executor, which any thread may wake, and at most until the next deadline of a request, so events
follow a result without delay. When the executor fails, requests wait until the next epoch has begun, and are computed
again from their ids.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from actors.decisions.failure.quarantine import Quarantine
from actors.decisions.schedule.captures import Captures
from actors.decisions.schedule.deadlines import Deadlines
from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.sequence import completed
from actors.decisions.schedule.settings import SchedulerSettings
from actors.decisions.schedule.stats import Stats
from actors.remote.revival import Attempt
from actors.remote.snapshot import EngineState, Snapshot
from actors.words.errors import EngineStopped, GangFailure, GangLost, IntegrityError, Verdict
from actors.words.executor import Executor, Revival, Revive
from actors.words.messages import Event, FinishReason, Request

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3  # to begin one epoch; at the last one all ranks start anew
_MAX_VAIN_EPOCHS = 8  # epochs in a row in which no running request gained an id
_NUM_REJOINED = 3  # so many vain epochs in a row may keep their surviving ranks; then all ranks start anew
_CHECK_EVERY_S = 10.0  # a check reads all weights: requests must not cause more of them


class Engine:
    """Owns the scheduler and the executor. Any thread may add or end requests; events go to `deliver`."""

    def __init__(
        self,
        executor: Executor,
        settings: SchedulerSettings,
        num_blocks: int,
        deliver: Callable[[list[Event]], None],
        revive: Revive | None = None,
    ) -> None:
        """`deliver` is called in the engine's thread with all events of a step, and must not block.
        It is called with no events when the engine's state has changed.

        `num_blocks`: of the KV cache of every rank. `revive` makes an executor for another epoch when one failed;
        without it a failure is the end.
        """
        self._executor = executor
        self.stats = Stats()
        self._scheduler = Scheduler(settings, num_blocks, self.stats)
        self._deliver = deliver
        self._revive = revive
        self._captures = Captures(settings.block_size)
        self._deadlines = Deadlines()  # of every epoch
        self._quarantine = Quarantine()
        self._num_vain_epochs = 0
        self._to_replay: set[str] = set()  # requests that ran when the last epoch ended and have no new id yet
        self._replay_began = 0.0
        self._checked_at = float("-inf")
        self._wakeup = threading.Event()  # set for commands and ended attempts, while there is no executor to wake
        self._commands: deque[Callable[[], list[Event]]] = deque()
        self._state: EngineState = "starting"
        self._failure = ""
        self._lock = threading.Lock()  # over the state: a command is either taken or refused
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread and serve."""
        self._captures.begin_epoch(self._executor.shapes, is_to_blame=False)
        self._state = "ready"
        self._thread.start()
        if self._captures.num_shapes:
            self._executor.wake()  # the first turn has something to capture

    def add(self, request: Request) -> None:
        """Queue a request; its events follow, the last one with a finish reason. Raises EngineStopped."""
        request = completed(request)
        self._command(lambda: self._add(request))

    def finish(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request: it was given up ("abort"), or its text has a stop string ("stop"). Ignores unknown ids."""
        with contextlib.suppress(EngineStopped):  # its terminal event is out already
            self._command(lambda: [event for event in [self._scheduler.finish(request_id, reason)] if event])

    def snapshot(self) -> Snapshot:
        """The engine's state and counts now. Any thread may call it."""
        counts = self._scheduler.counts()
        return Snapshot(
            self._state,
            self._scheduler.epoch,
            self._scheduler.num_running,
            self._scheduler.num_waiting + len(self._commands),
            counts.total,
            counts.used,
            counts.cached,
            self._captures.state,
        )

    @property
    def state(self) -> EngineState:
        """What the engine does at present. Any thread may ask."""
        return self._state

    @property
    def failure(self) -> str:
        """Why the last epoch ended; empty while none has."""
        return self._failure

    def close(self) -> None:
        """End every request, the thread and the executor. May be called twice."""
        with self._lock:
            self._state = "stopped"
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._executor.close()

    def _command(self, command: Callable[[], list[Event]]) -> None:
        with self._lock:
            if self._state not in ("ready", "recovering"):
                raise EngineStopped(self._failure or f"the engine is {self._state}")
            self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        self._executor.wake()
        self._wakeup.set()

    def _add(self, request: Request) -> list[Event]:
        try:
            self._scheduler.add(request)
        except ValueError as error:
            self.stats.num_finished["error"] += 1
            return [Event(request.request_id, [], "error", str(error))]
        except Exception:  # only this request fails
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
        """Serve until the gang fails → why; or until the engine is closed → None."""
        try:
            while self._state == "ready":
                self._turn()
        except GangFailure as failure:
            return failure.verdict
        except IntegrityError as failure:
            return Verdict("accounting", str(failure))
        return None

    def _turn(self) -> None:
        """Wait for results, submit the next steps, and only then deliver the events: the ranks compute meanwhile."""
        events: list[Event] = []
        try:
            for result in self._executor.wait(self._deadlines.seconds_left(time.monotonic())):
                events += self._scheduler.complete(result)
            events += self._take_commands()
            while step := self._scheduler.next_step():
                self._executor.submit(step)
                self._captures.submitted(step)
            self._order_captures()
        finally:  # ids that came are delivered, though submitting may have failed
            if events:
                self._deliver(events)
        if events:
            self._note(events)
            if not self._scheduler.num_live:
                self._scheduler.check()

    def _order_captures(self) -> None:
        """Let the ranks capture the next shape of a step, where one is due."""
        if not self._captures.num_shapes:
            return
        for outcome in self._executor.take_captured():
            self._scheduler.resume()
            self._captures.ended(outcome)
        bucket = self._captures.order(is_idle=not self._scheduler.num_live and not self._scheduler.num_in_flight)
        if bucket is not None:
            self._executor.capture(bucket)

    def _end_all(self, state: EngineState, error: str) -> None:
        """End every request with an error, and refuse new ones from now on."""
        with self._lock:
            if self._state != "stopped":
                self._state = state
            self._failure = error
            events = self._take_commands()
        self._deliver(events + self._scheduler.fail_all(error))

    def _note(self, events: list[Event]) -> None:
        """Note what events say of the gang: requests gained ids, replay is done, or logits are not finite."""
        if any(event.token_ids for event in events):
            self._num_vain_epochs = 0
        if self._to_replay:
            self._to_replay -= {event.request_id for event in events if event.token_ids or event.finish_reason}
            if not self._to_replay:
                self.stats.recovery_s["replay"].observe(time.monotonic() - self._replay_began)
        is_odd = any(event.code == "numerical_error" for event in events)
        if is_odd and time.monotonic() - self._checked_at > _CHECK_EVERY_S:
            self._checked_at = time.monotonic()
            self._executor.check()

    def _recover(self, verdict: Verdict) -> None:
        """Begin another epoch, in which all live requests go on. Raises GangFailure when none can begin."""
        with self._lock:
            if self._state == "ready":
                self._state = "recovering"
            self._failure = verdict.reason
        self._deliver([])
        self._num_vain_epochs += self._scheduler.num_in_flight > 0
        num_ids_after = self._scheduler.begin_epoch()
        self._to_replay = {name for step in num_ids_after.values() for name in step} & set(self._scheduler.num_ids)
        revival = self._begin_epoch(verdict)
        if revival is None:
            return
        events = self._judge(revival.verdict, num_ids_after)
        self.stats.num_rebuilds[revival.verdict.cause] += 1
        for phase, seconds in revival.seconds.items():
            self.stats.recovery_s[phase].observe(seconds)
        self._captures.begin_epoch(revival.executor.shapes, revival.verdict.is_from_within)
        self._replay_began = time.monotonic()
        with self._lock:
            if self._state == "recovering":
                self._state = "ready"
        self._executor.wake()  # the first turn submits what waits
        self._deliver(events)
        self._deliver([])

    def _begin_epoch(self, verdict: Verdict) -> Revival | None:
        """Try to begin an epoch, while requests come and go. None: the engine was closed. Raises GangFailure."""
        error = verdict.reason
        for attempt in range(_MAX_ATTEMPTS):
            if self._revive is None or self._state != "recovering" or self._num_vain_epochs > _MAX_VAIN_EPOCHS:
                break
            if attempt:
                self._scheduler.epoch += 1  # nothing has run since the last one began
            is_fresh = attempt == _MAX_ATTEMPTS - 1 or self._num_vain_epochs > _NUM_REJOINED
            trying = Attempt(self._revive, self._scheduler.epoch, verdict, is_fresh, self._wakeup.set)
            self._wait_for(trying)
            try:
                revival = trying.result()
            except Exception as failure:  # the next attempt may succeed
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
        """Wait for the end of an attempt. New requests queue up meanwhile, and those that are given up or late end."""
        while not attempt.is_done:
            self._wakeup.wait(self._deadlines.seconds_left(time.monotonic()))
            self._wakeup.clear()
            if events := self._take_commands():
                self._deliver(events)

    def _judge(self, verdict: Verdict, num_ids_after: dict[int, dict[str, int]]) -> list[Event]:
        """Make requests of the culprit's step suspects, and fail the one that ended its rank while it ran alone."""
        if not verdict.is_from_within:
            return []
        guilty = self._quarantine.death(num_ids_after.get(verdict.step, {}), self._scheduler.num_ids)
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
