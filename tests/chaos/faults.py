"""Faults: signals to a rank's process, and spells that a request's own ids cast on a rank.

A spell is the beginning of a prompt. Only `HauntedActor`, which tests put in place of RankActor, reads them: the
product knows no spells. It acts when its sequence comes to the token that it names, each time or once in all.
"""

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.remote.actor_pool import RankActor
from actors.words.messages import StepBatch

MARK = [1001, 1002, 1001]
ACTS = ("exit", "segfault", "raise", "hang", "freeze", "slow", "nan")
POINTS = ("before", "inside", "after")  # of the step's computation
SLOW_S = 0.3
FOREVER_S = 600


@dataclass(frozen=True)
class Spell:
    """What befalls a rank when it computes token `at` of the sequence (0: the first generated one)."""

    act: str
    rank: int
    at: int = 0
    point: str = "before"  # "nan" is always inside
    once: int | None = None  # a number of its own for a spell that acts once, also when the request is replayed

    def ids(self) -> list[int]:
        """Itself as the beginning of a prompt; ids of a vocabulary of 1024."""
        once = 1000 if self.once is None else self.once
        assert max(self.rank, self.at, once - 1) < 1000
        return [*MARK, ACTS.index(self.act), self.rank, self.at, POINTS.index(self.point), once]

    @staticmethod
    def read(ids: list[int]) -> "Spell | None":
        if ids[:3] != MARK:
            return None
        act, rank, at, point, once = ids[3:8]
        return Spell(ACTS[act], rank, at, POINTS[point], None if once == 1000 else once)


@dataclass
class Cursed:
    """A sequence whose prompt begins with a spell."""

    spell: Spell
    num_prompt: int
    has_acted: bool = False


class Haunt:
    """Reads the steps of one rank and says what befalls it. `folder` remembers the spells that act once."""

    def __init__(self, rank: int, folder: Path) -> None:
        self._rank = rank
        self._folder = folder
        self._cursed: dict[int, Cursed] = {}  # by sequence

    def due(self, step: StepBatch) -> dict[int, Spell]:
        """By sequence, the spells that act in this step."""
        for seq in step.closed:
            self._cursed.pop(seq, None)
        opened = {new.seq: new for new in step.opened}
        acting = {}
        for entry in step.entries:
            if new := opened.get(entry.seq):
                ids = [*new.known_ids, *entry.ids]
                spell = Spell.read(ids)
                self._cursed.pop(entry.seq, None)
                if spell is not None and spell.rank == self._rank:
                    self._cursed[entry.seq] = Cursed(spell, new.num_prompt or len(ids))
            one = self._cursed.get(entry.seq)
            if one is not None and entry.sample and self._is_due(one, entry.start + max(1, len(entry.ids))):
                acting[entry.seq] = one.spell
        return acting

    def _is_due(self, one: Cursed, num_computed: int) -> bool:
        """`num_computed`: ids of the sequence that went through the model once this step has ended."""
        if num_computed < one.num_prompt + one.spell.at or (one.has_acted and one.spell.act != "slow"):
            return False
        one.has_acted = True
        if one.spell.once is None:
            return True
        try:
            (self._folder / f"once-{one.spell.once}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _segfault() -> None:
    ctypes.string_at(0)


def _raise() -> None:
    raise ArithmeticError("a fault that a test has put in")


ACTIONS = {
    "exit": lambda: os._exit(13),
    "segfault": _segfault,
    "raise": _raise,
    "hang": lambda: time.sleep(FOREVER_S),  # the heartbeat goes on
    "freeze": lambda: ctypes.PyDLL(None).sleep(FOREVER_S),  # with the interpreter's lock: nothing goes on
    "slow": lambda: time.sleep(SLOW_S),
}


class HauntedActor(RankActor):
    """A RankActor whose Runner obeys spells; `haunted_actor` gives it its folder."""

    folder: str

    def make_runner(self, *parts: Any) -> Any:
        from tests.chaos.haunted_runner import haunted_runner

        return haunted_runner(Path(self.folder))(*parts)


def haunted_actor(folder: Path) -> type[RankActor]:
    """What tests put in as `Gang.actor_class`."""
    return type("HauntedActor", (HauntedActor,), {"folder": str(folder)})


def send(pid: int, number: signal.Signals) -> float:
    """Send a signal to a rank's process; returns when (monotonic seconds)."""
    moment = time.monotonic()
    os.kill(pid, number)
    return moment
