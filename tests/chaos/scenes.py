"""Scenes: a crowd before a served demo, what befalls the ranks meanwhile, and the verdict on every request."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

from tests.chaos.clients import Crowd, Question, ask_all, crowd, goldens, questions
from tests.chaos.faults import Spell, send
from tests.chaos.histories import Golden, History, check, check_failed, golden_of, read, stall
from tests.chaos.serving import MODEL, App
from tests.serving import is_alive, until

NUM_STREAMS, NUM_PLAIN, NUM_SEEDED = 8, 2, 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Script:
    """What a crowd asks, and what it is answered when nobody disturbs the server."""

    asked: dict[str, list[Question]]
    golden: dict[str, Golden]


def rehearse(app: App, seed: int = 0, max_tokens: tuple[int, int] = (80, 240), share: int = 1) -> Script:
    """Ask everything once. `share`: only so many of the questions, one in …"""
    asked = {kind: group[::share] for kind, group in questions(MODEL, seed, max_tokens).items()}
    return Script(asked, goldens(app.url, [question for group in asked.values() for question in group]))


@dataclass
class Scene:
    """A server, a script, and the crowd."""

    app: App
    people: Crowd
    asked: dict[str, list[Question]]
    golden: dict[str, Golden]
    problems: list[str] = field(default_factory=list)
    num_checked: int = 0

    def judge(self, histories: list[History]) -> None:
        """Hold every request of the script against its golden answer."""
        for history in histories:
            if history.name in self.golden:
                self.problems += check(history, self.golden[history.name])
                self.num_checked += 1

    def all_speak(self, since: float) -> bool:
        """Whether every stream that is under way has had a token since then."""
        under_way = [one for one in list(self.people.histories) if one.is_stream and one.ended_at is None]
        last = [next((at for at, line in reversed(one.lines) if line[:5] == "data:"), 0.0) for one in under_way]
        return len(under_way) >= NUM_STREAMS and min(last) > since

    def wait_until_all_speak(self) -> None:
        begun = time.monotonic()
        until(lambda: self.all_speak(begun), within_s=60)

    def longest_stall_s(self, begin: float, end: float) -> float:
        """Of all streams, the longest time without a token that touches [begin, end]."""
        present = [one for one in list(self.people.histories) if one.is_stream and (one.ended_at or end) >= begin]
        return max(stall(one, begin, end) for one in present)


@contextmanager
def scene(app: App, script: Script | None = None, seed: int = 0) -> Iterator[Scene]:
    """Nobody is in the crowd yet; at the end all answers are waited for and judged."""
    script = script or rehearse(app, seed)
    with crowd(app.url, seed) as people:
        play = Scene(app, people, script.asked, script.golden)
        yield play
        people.stop()
    play.judge(people.histories)


def usual_crowd(play: Scene) -> None:
    """8 streams, 2 plain and 2 seeded requests at any time."""
    play.people.circle(play.asked["stream"], NUM_STREAMS)
    play.people.circle(play.asked["plain"], NUM_PLAIN)
    play.people.circle(play.asked["seeded"], NUM_SEEDED)


@dataclass
class Blow:
    """One fault from outside, and what it cost."""

    rank: int
    at: float  # monotonic seconds
    epoch: int  # before
    second: int | None = None  # a rank that was struck while the gang was being rebuilt
    noticed_s: float = 0.0
    back_s: float = 0.0  # ready again
    stall_s: float = 0.0  # the longest that a stream waited for a token
    health: set[int] = field(default_factory=set)  # what /health said until then


def strike(play: Scene, rank: int, number: Signals = SIGKILL, second: tuple[int, float] | None = None) -> Blow:
    """Send a signal to one rank, and wait until a later epoch serves; `second`: another rank, so many seconds later."""
    before = play.app.cluster()
    pids = [one["pid"] for one in before["ranks"]]
    blow = Blow(rank, 0.0, before["epoch"])
    blow.at = send(pids[rank], number)
    if second is not None:
        blow.second, after_s = second
        time.sleep(after_s)
        with suppress(ProcessLookupError):
            send(pids[blow.second], number)
    blow.noticed_s = until(lambda: has_noticed(play.app, blow.epoch), every_s=0.03)
    play.people.ask(play.asked["stream"][0])  # waits for the gang

    def is_back() -> bool:
        blow.health.add(play.app.status("/health"))
        return play.app.epoch() > blow.epoch and play.app.is_ready()

    until(is_back, every_s=0.05)
    blow.back_s = time.monotonic() - blow.at
    until(lambda: not is_alive(pids[rank]), within_s=15)  # also who is only stopped
    return blow


def has_noticed(app: App, epoch: int) -> bool:
    state = app.cluster()
    return bool(state["state"] != "ready" or state["epoch"] > epoch)


def strikes(
    play: Scene,
    count: int,
    chance: random.Random,
    tell: Say,
    number: Signals = SIGKILL,
    doubled: float = 0.0,
    rest_s: float = 0.0,
) -> list[Blow]:
    """Blow after blow at random ranks and moments, each when the streams have come back from the one before.

    `doubled`: the share of them that is followed by a second blow while the gang is being rebuilt. `rest_s`: what a
    blow leaves to the gang at least before the next one, for example to have its spare back.
    """
    blows: list[Blow] = []
    num_ranks = len(play.app.pids())
    for turn in range(count):
        play.wait_until_all_speak()
        time.sleep(rest_s + chance.uniform(0.1, 1.5))
        second = (chance.randrange(num_ranks), chance.uniform(0.1, 3.0)) if chance.random() < doubled else None
        blow = strike(play, chance.randrange(num_ranks), number, second)
        end = time.monotonic()
        play.wait_until_all_speak()
        blow.stall_s = play.longest_stall_s(blow.at, end)
        blows.append(blow)
        then = "" if blow.second is None else f" and then {blow.second}"
        tell(
            f"{turn + 1}/{count}: rank {blow.rank}{then}, noticed after {blow.noticed_s:.2f} s, "
            f"ready after {blow.back_s:.2f} s, longest stall {blow.stall_s:.2f} s"
        )
    return blows


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def median(values: list[float]) -> float:
    return statistics.median(values)


def num_tokens(histories: list[History], golden: dict[str, Golden]) -> int:
    """Tokens of the answers that ended as they should."""
    return sum(
        golden[one.name].usage[1] for one in histories if one.name in golden and not check(one, golden[one.name])
    )


def spelled(question: Question, spell: Spell, **more: Any) -> Question:
    """The question with a spell before its prompt."""
    body = {**question.body, "prompt": spell.ids() + question.body["prompt"], **more}
    return Question(f"{spell}: {question.name}", question.route, body)


def golden_of_spelled(app: App, question: Question, spell: Spell, folder: Path) -> Golden:
    """What a question gets whose spell, one that acts once, does not act; it still will."""
    charm = folder / f"once-{spell.once}"
    charm.touch(exist_ok=False)
    golden = golden_of(ask_all(app.url, [question])[0])
    charm.unlink()
    return golden


@dataclass
class Poison:
    """A request that did harm each time it was computed, and what came of it."""

    spell: Spell
    rebuilds: int
    seconds: float  # from its sending to its end
    problems: list[str]


def poison(play: Scene, spell: Spell, code: str) -> Poison:
    """Ask something that harms a rank each time it is computed; it should fail with `code`, and the gang come back."""
    epoch = play.app.epoch()
    play.wait_until_all_speak()
    history = play.people.ask(spelled(play.asked["stream"][0], spell))
    until(lambda: history.ended_at is not None)
    until(play.app.is_ready)
    assert history.ended_at is not None
    seconds = history.ended_at - history.sent_at
    return Poison(spell, play.app.epoch() - epoch, seconds, check_failed(history, None, code))


def sicken(play: Scene, spell: Spell, folder: Path) -> list[str]:
    """NaN in one request's activations, once: it fails before a wrong token leaves, and asked again it is sound."""
    kind = ("stream", "seeded")[(spell.once or 0) % 2]
    question = spelled(play.asked[kind][(spell.once or 0) % 4], spell, logprobs=0, max_tokens=spell.at + 20)
    golden = golden_of_spelled(play.app, question, spell, folder)
    sick, again = ask_all(play.app.url, [question, question])
    problems = check_failed(sick, golden, "numerical_error") + check(again, golden)
    tokens = read(sick).tokens or []
    if len(tokens) > spell.at or tuple(tokens) != (golden.tokens or ())[: len(tokens)]:
        problems.append(f"{question.name}: {len(tokens)} tokens left before token {spell.at} was found to be none")
    return problems
