"""Rows of Ray Data's batches on one gang, without Ray: what waits for an answer, while another host is asked."""

import itertools
import threading

import numpy as np
import pytest

from configs.config import Config
from deployments.batch import ray_data
from deployments.batch.rows import Outcome

pytestmark = pytest.mark.timeout(60)


class Gone(ray_data.RayError):
    """A host is lost."""


class Host:
    """What a gang calls of its host."""

    def __init__(self):
        self.add, self.rows = self, []

    def remote(self, rows):
        self.rows += rows


@pytest.fixture
def gang(monkeypatch):
    """A gang with a host that only takes rows."""
    gang = object.__new__(ray_data._Gang)
    gang._config = Config.model_validate({"model": {"source": "/nowhere", "name": "tiny"}})
    gang._numbers, gang._waiting, gang._host = itertools.count(), {}, Host()
    gang._lock, gang._has_rows = threading.Lock(), threading.Event()
    monkeypatch.setattr(ray_data.ray, "kill", lambda host: None)
    return gang


def test_a_value_that_is_no_json_leaves_nothing_waiting(gang):
    with pytest.raises(TypeError):
        gang.answer([{"prompt": "one"}, {"prompt": "two", "max_tokens": np.int64(3)}])
    assert not gang._waiting and not gang._host.rows


def test_rows_that_come_while_a_host_is_replaced_are_sent_once_to_the_new_one(gang, monkeypatch):
    """Its start takes long: a call that comes meanwhile waits for the lock first."""
    old, new = gang._host, Host()
    first = threading.Thread(target=gang.answer, args=([{"prompt": "one"}],), daemon=True)
    second = threading.Thread(target=gang.answer, args=([{"prompt": "two"}, {"prompt": "three"}],), daemon=True)
    first.start()
    assert gang._has_rows.wait(10)

    def start():
        second.start()
        second.join(0.2)  # it stands at the lock
        return new

    monkeypatch.setattr(gang, "_start", start)
    gang._has_rows.clear()
    gang._replace(Gone(), 1)
    assert gang._has_rows.wait(10)
    assert [row.number for row in old.rows] == [0]
    assert sorted(row.number for row in new.rows) == [0, 1, 2]
    for number, (_, future) in list(gang._waiting.items()):
        future.set_result(Outcome(number, 200, b"{}"))
    first.join(10)
    second.join(10)
    assert not first.is_alive() and not second.is_alive()
