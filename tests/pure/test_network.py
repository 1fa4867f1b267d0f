"""The interface that ranks listen on, and the one error where nodes do not reach each other."""

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest

from actors.remote import reach
from actors.remote.gang import Gang
from actors.remote.reach import check_ranks_reach, check_ray_reaches
from actors.words.errors import GangFailure, GangLost, Verdict
from cluster.collectives.network import (
    REFUSED,
    Failure,
    Place,
    check_distinct,
    find_place,
    knock,
    open_door,
    pin_interface,
    told,
)
from cluster.placement import interfaces


def test_without_a_name_it_is_the_interface_of_the_nodes_address() -> None:
    assert find_place(None, "id", "127.0.0.1") == Place("id", socket.gethostname(), "lo", "127.0.0.1")
    assert find_place(None, "id", "203.0.113.7").interface == "", "an address that is translated on the way"
    assert str(Place("id", "one", "", "203.0.113.7")) == "one (203.0.113.7)"


@pytest.mark.parametrize("asked", ["lo", "l*", "none0,lo", "none*, lo"])
def test_names_and_beginnings_of_names(asked: str) -> None:
    assert find_place(asked, "id", "203.0.113.7").address == "127.0.0.1"


def test_an_address_with_a_label_is_its_interfaces_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(family: int, address: str) -> Any:
        return Mock(family=family, address=address)

    v4, v6 = socket.AF_INET, socket.AF_INET6
    there = {
        "d0": [entry(v6, "fe80::1%d0"), entry(v6, "fd00::1"), entry(v4, "10.0.0.1")],
        "d0:1": [entry(v4, "10.0.0.9")],
        "d1": [entry(v6, "fd00::2")],
        "d2": [entry(v4, "10.0.0.3")],
    }
    monkeypatch.setattr(interfaces.psutil, "net_if_addrs", lambda: there)
    states = {name: Mock(isup=name != "d2", mtu=1500, speed=0) for name in ("d0", "d1", "d2")}
    monkeypatch.setattr(interfaces.psutil, "net_if_stats", lambda: states)
    found = [(one.name, one.address) for one in interfaces.read_interfaces()]
    assert found == [("d0", "10.0.0.1"), ("d0", "10.0.0.9"), ("d0", "fd00::1"), ("d1", "fd00::2")]
    assert find_place(None, "id", "10.0.0.9").interface == "d0"
    assert [find_place(name, "id", "10.0.0.9").address for name in ("d0", "d1")] == ["10.0.0.1", "fd00::2"]


def test_a_name_is_no_beginning() -> None:
    with pytest.raises(ValueError, match=r"network\.interface: l: node .* has no such interface(.|\n)*lo 127\.0\.0\.1"):
        find_place("l", "id", "127.0.0.1")


def test_what_the_environment_says_stays_and_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    pin_interface("")
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    pin_interface("eth0")
    pin_interface("eth0")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("=eth0", "eth9")
    assert "GLOO_SOCKET_IFNAME=eth9 is set and stays" in caplog.text and "NCCL" not in caplog.text


def test_doors_answer_until_they_are_closed() -> None:
    door, port = open_door("127.0.0.1")
    open_reason, gone = knock([("127.0.0.1", port), ("127.0.0.1", 1)], timeout_s=5)
    assert (open_reason, gone) == (None, REFUSED)
    door.close()
    assert knock([("127.0.0.1", port)], timeout_s=5) == [REFUSED]
    assert knock([], timeout_s=5) == []


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """Where nobody answers: once the queue of a listener is full, the kernel drops what comes, as a firewall does."""
    door = socket.create_server(("127.0.0.1", 0), backlog=0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(door.getsockname())
    yield door.getsockname()
    for one in (door, *fillers):
        one.close()


def test_who_does_not_answer_is_late(silent: tuple[str, int]) -> None:
    assert knock([silent], timeout_s=0.3) == ["no answer within 0.3 s"]


def test_the_error_names_both_nodes_the_port_and_the_remedy() -> None:
    one, two = Place("a", "one", "eth0", "10.0.0.1"), Place("b", "two", "eth1", "10.0.0.2")
    said = told([Failure(one, two, 41234, "no answer within 4 s")])
    assert "one (eth0, 10.0.0.1) does not reach two (eth1, 10.0.0.2), port 41234: no answer within 4 s" in said
    assert "firewalls" in said and "network.interface" in said


def test_two_nodes_with_one_address_are_refused() -> None:
    one = Place("a", "one", "docker0", "172.17.0.1")
    check_distinct([one, one, Place("b", "two", "docker0", "172.17.0.2")])
    with pytest.raises(ValueError, match=r"one \(docker0, 172\.17\.0\.1\) and two .* one address"):
        check_distinct([one, Place("b", "two", "docker0", "172.17.0.1")])


# What ranks on nodes say, without ranks


class Call(NamedTuple):
    """A method that is called as Ray's are, and gives its result instead of a reference."""

    remote: Callable[..., Any]


class Actor:
    """A rank's process, as far as reaching others goes."""

    def __init__(self, shut_for: int) -> None:
        """`shut_for`: in so many first tries it reaches nobody."""
        self.num_tries, self.num_closed = 0, 0
        self.shut_for = shut_for
        self.open_door, self.knock, self.close_door = Call(lambda: 40_000), Call(self._knock), Call(self._close)

    def _knock(self, doors: list[tuple[str, int]], timeout_s: float) -> list[str | None]:
        self.num_tries += 1
        self.tried = doors
        return [REFUSED if self.num_tries <= self.shut_for else None for _ in doors]

    def _close(self) -> None:
        self.num_closed += 1


ONE, TWO = (Place(name, name, "eth0", f"10.0.0.{number}") for number, name in enumerate(("one", "two"), 1))


def check(actors: list[Actor], places: list[Place], patience_s: float) -> None:
    check_ranks_reach(lambda refs, what: refs, actors, places, ONE, 50_000, patience_s)


def test_every_rank_tries_each_other_node_once_and_the_step_channel() -> None:
    actors = [Actor(0) for _ in range(4)]
    check(actors, [ONE, ONE, TWO, TWO], patience_s=0)
    there, back = [("10.0.0.2", 40_000)], [("10.0.0.1", 40_000), ("10.0.0.1", 50_000)]
    assert [actor.tried for actor in actors] == [there, there, back, back]
    assert [actor.num_closed for actor in actors] == [1] * 4


def test_on_one_node_nobody_tries() -> None:
    actors = [Actor(9), Actor(9)]
    check(actors, [ONE, ONE], patience_s=0)
    assert [actor.num_tries for actor in actors] == [0, 0]


def test_each_two_nodes_are_named_once() -> None:
    with pytest.raises(ValueError, match=r"one .* does not reach two .* port 40000: connection refused") as caught:
        check([Actor(9) for _ in range(4)], [ONE, ONE, TWO, TWO], patience_s=0)
    assert str(caught.value).count("does not reach") == 2


def test_in_a_recovery_they_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_PAUSE_S", 0.01)
    actors = [Actor(0), Actor(3)]
    check(actors, [ONE, TWO], patience_s=60)
    assert [actor.num_tries for actor in actors] == [4, 4]


def test_a_recovery_that_has_waited_for_a_way_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gang = object.__new__(Gang)
    gang._plan, gang._config, gang.executor, gang.num_blocks = Mock(), Mock(), Mock(), 1
    gang._config.recovery.mode, gang.executor.clock.stalled_s.return_value = "", 0.0
    monkeypatch.setattr(gang, "_end_epoch", lambda *_: gang._phase_s.update(drain=0.0))
    monkeypatch.setattr(gang, "_open_channel", Mock())
    for raised, expected in ((reach.Unreachable("no way"), GangLost), (ValueError("a port is taken"), GangFailure)):
        monkeypatch.setattr(gang, "_assemble", Mock(side_effect=raised))
        with pytest.raises(GangFailure) as caught:
            gang.revive(2, Verdict("killed", "gone"), False)
        assert type(caught.value) is expected


def test_a_rank_that_lives_where_ray_is_not_let_through_is_named(
    silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "_KNOCK_S", 0.3)
    ended, mute = (Place("b", "two", "", "127.0.0.1"), 1), (Place("b", "two", "", silent[0]), silent[1])
    unheard = check_ray_reaches([ended, mute], ONE, set())
    assert unheard == {mute}, "late once; the other is refused: its process has just ended"
    assert check_ray_reaches([ended], ONE, {ended, mute}) == set()
    with pytest.raises(ValueError, match=r"does not reach two \(127\.0\.0\.1\), port \d+: no answer .* Ray's workers"):
        check_ray_reaches([mute], ONE, unheard)
