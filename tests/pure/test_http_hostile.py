"""The hostile corpus against one replica without Ray, each case beside four streams that must not notice it."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.hostile.corpus import Target, check, corpus, golden_requests, said, send
from tests.serving import until

TARGET = Target("tiny", 400, 128, 16, 2**18, 600.0)


class Served:
    """One app behind uvicorn for all cases, and what its four golden streams say when nobody disturbs them."""

    def __init__(self, world, url):
        self.world = world
        host, _, port = url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.requests = golden_requests(TARGET, 24)
        self.threads = ThreadPoolExecutor(len(self.requests))
        self.golden = self.streams()

    def streams(self):
        return [said(send(self.address, request).body) for request in self.requests]

    def beside(self, case):
        """The answer to a case that is sent while the four streams run, and what these said."""
        ready = threading.Barrier(len(self.requests) + 1)

        def stream(request):
            ready.wait(20)
            return said(send(self.address, request).body)

        streams = [self.threads.submit(stream, request) for request in self.requests]
        ready.wait(20)
        answer = send(self.address, case)
        return answer, [stream.result() for stream in streams]


@pytest.fixture(scope="module")
def served(text, world_type):
    names = ("max_model_len", "vocab_size", "max_requests", "max_body_bytes", "request_s")
    world = world_type(text, **{name: getattr(TARGET, name) for name in names})
    with world.serve() as url:
        served = Served(world, url)
        yield served
        served.threads.shutdown()
    world.close()


def test_the_corpus_is_large_and_the_streams_are_what_they_seem(served):
    assert len(corpus(TARGET)) >= 200
    assert served.golden == served.streams()
    assert all(stream.is_done and stream.text and stream.ends for stream in served.golden)
    assert len({stream.text for stream in served.golden}) == 3  # of the same prompt, two are greedy
    assert served.golden[0].logprobs and served.golden[2].usage


@pytest.mark.parametrize("case", corpus(TARGET), ids=lambda case: case.id)
def test_a_hostile_request_is_answered_and_changes_nothing(served, case):
    answer, streams = served.beside(case)
    check(case, answer)
    assert streams == served.golden
    assert answer.seconds < 10
    engine = served.world.engine
    admission = served.world.service.admission
    until(lambda: not (engine.snapshot().blocks_used or admission.num_admitted), within_s=2, every_s=0.002)
    assert (engine.state, engine.snapshot().epoch) == ("ready", 0)
    assert served.world.outbox._mailboxes == {}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_thousand_idle_connections_slow_senders_and_half_closed_sockets_change_nothing(served):
    request = served.requests[0].request()
    head = request[: request.index(b"\r\n\r\n") + 2]
    with contextlib.ExitStack() as opened:

        def connect(said=b"", is_half_closed=False):
            connection = opened.enter_context(socket.create_connection(served.address, timeout=20))
            connection.sendall(said)
            if is_half_closed:
                connection.shutdown(socket.SHUT_WR)
            return connection

        for _ in range(1000):
            connect()
        slow = [connect(request[:20]) for _ in range(50)]
        for _ in range(50):
            connect(request[:-10], is_half_closed=True)
            connect(is_half_closed=True)
        for _ in range(20):
            connect(head + b"x-large: " + b"x" * 60_000)  # and never an end
        for at in range(20, 120):
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.sendall(request[at : at + 1])
            if at % 10 == 0:
                assert served.streams() == served.golden
    until(lambda: not served.world.service.admission.num_admitted, within_s=60)
    assert served.streams() == served.golden
    assert (served.world.engine.state, served.world.engine.snapshot().epoch) == ("ready", 0)
