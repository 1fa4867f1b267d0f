"""The profile of a step: every moment of a rank belongs to one phase, and the command shows what passed."""

import json
from typing import Any

import pytest

from actors.decisions.schedule.phase_clock import PHASES, PhaseClock, bubble_ratio
from deployments import cli
from deployments.bench import profile


def test_every_moment_belongs_to_one_phase() -> None:
    now = iter([10.0, 12.0, 17.0, 18.0])
    clock = PhaseClock(lambda: next(now))
    clock.lap("idle")  # 2 s
    clock.within("exchange", 1.5)  # of the 5 s that follow
    clock.lap("compute")
    clock.lap("sample")
    assert clock.seconds == {**dict.fromkeys(PHASES, 0.0), "idle": 2, "exchange": 1.5, "compute": 3.5, "sample": 1}
    assert bubble_ratio(clock.seconds) == 0.25
    assert bubble_ratio(dict.fromkeys(PHASES, 0.0)) == 0


def answer(*spent: dict[str, float], epoch: int = 0) -> dict[str, Any]:
    ranks = [{"rank": rank, "stage": rank, "shard": 0, "seconds": seconds} for rank, seconds in enumerate(spent)]
    return {"model": "m", "replica": "r", "epoch": epoch, "ranks": ranks}


def asked(monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, Any]]) -> None:
    left = iter(answers)
    monkeypatch.setattr(profile, "cluster", lambda url: next(left))
    monkeypatch.setattr(profile.time, "sleep", lambda seconds: None)


def test_the_command_shows_what_passed_between(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = answer({"idle": 100.0, "compute": 1.0}, {})
    after = answer({"idle": 101.0, "compute": 8.0, "exchange": 2.0}, {"receive": 1.0, "compute": 3.0})
    asked(monkeypatch, [before, after])
    assert cli.main(["profile", "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)
    assert first["shares"] == {**dict.fromkeys(PHASES, 0.0), "idle": 0.1, "compute": 0.7, "exchange": 0.2}
    assert (first["bubble_ratio"], last["bubble_ratio"]) == (0.1, 0.25)
    asked(monkeypatch, [before, after])
    assert cli.main(["profile"]) == 0
    text = capsys.readouterr().out
    assert "70.0%" in text
    assert all(phase in text for phase in PHASES)


def test_what_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked(monkeypatch, [answer({"idle": 1.0}), answer({"idle": 2.0}, epoch=1)])
    assert cli.main(["profile"]) == 1
    assert "another replica or epoch" in capsys.readouterr().err
    asked(monkeypatch, [answer({"idle": 1.0}), answer({"idle": 1.0})])
    assert cli.main(["profile"]) == 1
    assert "rank 0 has told nothing new" in capsys.readouterr().err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "http://127.0.0.1:9"]) == 1
    assert "no stagemesh server answers there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", "--seconds", "0.9"])
    assert ended.value.code == 2
    assert "give from 1 to 3600 seconds" in capsys.readouterr().err
