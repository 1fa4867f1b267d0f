"""The outbox: one wake-up a step, merged events for a slow reader, nothing for nobody."""

import asyncio
import threading

from actors.words.messages import Event, TokenLogprobs
from deployments.api.outbox import Outbox


def test_one_wake_up_a_step_however_many_requests():
    async def go():
        outbox = Outbox()
        loop = asyncio.get_running_loop()
        mailboxes = [outbox.open([f"r{index}"]) for index in range(50)]
        wake_ups = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (wake_ups.append(args), original(*args))
        events = [Event(f"r{index}", [index]) for index in range(50)]
        thread = threading.Thread(target=outbox.deliver, args=(events,))
        thread.start()
        thread.join()
        assert len(wake_ups) == 1
        for index, mailbox in enumerate(mailboxes):
            assert await mailbox.take() == [Event(f"r{index}", [index])]

    asyncio.run(go())


def test_what_a_slow_reader_has_not_taken_is_one_event():
    async def go():
        outbox = Outbox()
        mailbox = outbox.open(["a", "b"])
        first = [1]
        outbox.deliver([Event("a", first), Event("b", [7])])
        for token in range(2, 1000):
            outbox.deliver([Event("a", [token])])
        outbox.deliver([Event("a", [1000], "length")])
        await asyncio.sleep(0)
        taken = {event.request_id: event for event in await mailbox.take()}
        assert taken["a"] == Event("a", list(range(1, 1001)), "length")
        assert taken["b"] == Event("b", [7])
        assert first == [1]  # the engine's own list is not written to
        outbox.deliver([Event("b", [8])])
        assert await mailbox.take() == [Event("b", [8])]

    asyncio.run(go())


def test_log_probabilities_are_merged_with_their_ids():
    async def go():
        outbox = Outbox()
        mailbox = outbox.open(["a"])
        told = [TokenLogprobs(-float(number), [], []) for number in range(6)]
        outbox.deliver([Event("a", [], prompt_logprobs=told[:2])])
        outbox.deliver([Event("a", [1], logprobs=told[3:4], prompt_logprobs=told[2:3])])
        outbox.deliver([Event("a", [2, 3], "stop", logprobs=told[4:])])
        await asyncio.sleep(0)
        assert await mailbox.take() == [Event("a", [1, 2, 3], "stop", logprobs=told[3:], prompt_logprobs=told[:3])]

    asyncio.run(go())


def test_events_of_closed_and_unknown_requests_are_dropped():
    async def go():
        outbox = Outbox()
        mailbox = outbox.open(["a", "b"])
        outbox.close("a")
        outbox.close("a")
        outbox.deliver([Event("a", [1]), Event("c", [1]), Event("b", [2])])
        assert await mailbox.take() == [Event("b", [2])]

    asyncio.run(go())


def test_a_closed_loop_does_not_hurt_the_engine(caplog):
    outbox = Outbox()
    outbox.deliver([Event("a", [1])])  # before anybody listens

    async def go():
        outbox.open(["a"])

    asyncio.run(go())
    outbox.deliver([Event("a", [1])])
    assert "1 events dropped" in caplog.text
