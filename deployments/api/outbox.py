"""The outbox: carries events from the engine's thread to the coroutines that wait for them.

A step wakes the event loop once, however many requests it had. Events that a slow reader has not taken yet are merged
into one for each request, so that no queue grows; who wants whole answers only is woken when they end. A delivery
without events says that the engine's state has changed: every waiting coroutine wakes up and looks at it.
"""

import asyncio
import logging

import msgspec

from actors.words.messages import Event

logger = logging.getLogger(__name__)


class Mailbox:
    """The events of one HTTP request's sequences, merged until they are taken."""

    def __init__(self) -> None:
        self._pending: dict[str, Event] = {}
        self._has_mail = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event, behind what is pending for its request."""
        pending = self._pending.get(event.request_id) or Event(event.request_id, [], logprobs=[], prompt_logprobs=[])
        pending.token_ids.extend(event.token_ids)
        pending.logprobs.extend(event.logprobs)
        pending.prompt_logprobs.extend(event.prompt_logprobs)
        self._pending[event.request_id] = msgspec.structs.replace(
            event,
            token_ids=pending.token_ids,
            logprobs=pending.logprobs,
            prompt_logprobs=pending.prompt_logprobs,
        )
        self._has_mail.set()

    def poke(self) -> None:
        """End the wait of `take`, though there may be no events."""
        self._has_mail.set()

    async def take(self, patience_s: float | None = None) -> list[Event] | None:
        """Wait for events, then take them all: at most one a sequence; an empty list after a `poke`.

        None when `patience_s` is over; without it no timer is set.
        """
        try:
            async with asyncio.timeout(patience_s):
                await self._has_mail.wait()
        except TimeoutError:
            return None
        self._has_mail.clear()
        pending, self._pending = self._pending, {}
        return list(pending.values())


class Outbox:
    """Where the engine delivers. Mailboxes are opened and closed in the event loop's thread."""

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._at_end: set[str] = set()  # requests whose events are held back until they end
        self._held: dict[str, list[Event]] = {}  # theirs, so far; used in the engine's thread

    def open(self, request_ids: list[str], at_end: bool = False) -> Mailbox:
        """One mailbox for all these requests; to be opened before the engine hears of them.

        `at_end`: the events of a request come together with its last one.
        """
        loop = asyncio.get_running_loop()
        assert loop is self._loop or not self._mailboxes, "all requests of a replica live on one event loop"
        self._loop = loop
        mailbox = Mailbox()
        self._mailboxes.update(dict.fromkeys(request_ids, mailbox))
        if at_end:
            self._at_end.update(request_ids)
        return mailbox

    def close(self, request_id: str) -> None:
        """Drop what comes for this request from now on. May be called twice."""
        self._mailboxes.pop(request_id, None)
        self._at_end.discard(request_id)

    def deliver(self, events: list[Event]) -> None:
        """Called in the engine's thread with all events of a step, or none for a new state; never blocks."""
        if self._loop is None:
            return  # no request has come yet
        due = self._due(events)
        if events and not due:
            return
        try:
            self._loop.call_soon_threadsafe(self._hand_over, due)
        except RuntimeError:  # the loop is closed; that must not end the engine
            logger.warning("%d events dropped: the HTTP side is gone", len(events))

    def _due(self, events: list[Event]) -> list[Event]:
        """These events without those that are held back, and with those that were, where a request has ended."""
        due = []
        for event in events:
            if event.finish_reason is None and event.request_id in self._at_end:
                self._held.setdefault(event.request_id, []).append(event)
                continue
            if self._held and event.finish_reason is not None:
                due += self._held.pop(event.request_id, [])
            due.append(event)
        return due

    def _hand_over(self, events: list[Event]) -> None:
        if not events:
            for waiting in self._mailboxes.values():
                waiting.poke()
        for event in events:
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is not None:
                mailbox.put(event)
