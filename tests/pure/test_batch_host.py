"""Rows on one gang, without Ray: answered as over HTTP, whatever runs beside; and how a job tells how far it is."""

import asyncio
import io
import json
import random
import socket
import time
from types import SimpleNamespace

import pytest

from actors.decisions.schedule.kv_admission import KVAdmission
from actors.words.errors import GangFailure
from deployments.api.bodies import ChatBody, CompletionBody
from deployments.api.responses import Stamp
from deployments.batch import host as host_module
from deployments.batch.host import Figures, RowAnswerer
from deployments.batch.progress import Progress
from deployments.batch.rows import Row, Tally
from tests.serving import until_true

pytestmark = pytest.mark.timeout(60)

CHAT = {"messages": [{"role": "user", "content": "the quick brown fox"}]}


def row(number, **fields):
    fields = {"model": "tiny", "max_tokens": 12, "seed": number, **fields}
    kind = ChatBody if "messages" in fields else CompletionBody
    return Row(number, f"row {number}", kind.model_validate(fields), Stamp(f"{number:032x}", 1_700_000_000), 100)


def answerer_of(world, max_ahead=8):
    return RowAnswerer(world.service, KVAdmission(256, 16, 8), max_ahead)


def answer(world, rows, sizes=(5,), max_ahead=8):
    """All outcomes by row, and the turns; rows are sent in portions of these sizes, as the host wants them."""

    async def go():
        answerer, left, found, turns = answerer_of(world, max_ahead), list(rows), {}, []
        wanted = max_ahead
        for size in [*sizes, *[max_ahead] * 10_000]:
            portion = [left.pop(0) for _ in range(min(size, wanted, len(left)))]
            turns.append(await answerer.turn(portion, bool(left)))
            wanted = turns[-1].num_wanted
            for outcome in turns[-1].outcomes:
                assert outcome.number not in found
                found[outcome.number] = outcome
            if len(found) == len(rows):
                break
        await answerer.close()
        return found, turns

    return asyncio.run(go())


def mixed_rows(count):
    kinds = [
        {"prompt": "one two three"},
        {"prompt": ["stage", "shard"], "n": 2, "temperature": 0.9},
        {"prompt": [5, 6, 7], "echo": True, "logprobs": 2},
        {**CHAT, "logprobs": True, "top_logprobs": 1},
        {"prompt": "lane", "stop": ["e", "你"], "max_tokens": 40},
        {"prompt": "rank", "min_tokens": 3, "top_k": 5},
        {"prompt": "a lazy dog", "return_token_ids": True, "prompt_logprobs": 1, "truncate_prompt_tokens": 2},
        {**CHAT, "continue_final_message": True, "echo": True, "return_token_ids": True, "skip_special_tokens": False},
    ]
    return [row(number, **kinds[number % len(kinds)]) for number in range(count)]


def test_answers_are_those_of_http(make_world):
    world = make_world()
    rows = mixed_rows(24)
    found, _ = answer(world, rows)
    for one in rows:
        body = one.body.model_dump(exclude_unset=True)
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        if "messages" in body:
            body["messages"] = CHAT["messages"]
        response = world.post(path, body).json()
        outcome = json.loads(found[one.number].body)
        assert found[one.number].status == 200
        assert outcome["id"].endswith(f"-{one.number:032x}") and outcome["created"] == 1_700_000_000
        assert {**outcome, "id": "", "created": 0} == {**response, "id": "", "created": 0}
    world.wait_until_idle()


def test_bytes_do_not_depend_on_what_ran_beside(make_world):
    rows = mixed_rows(30)
    alone, _ = answer(make_world(), rows, sizes=[1] * 60, max_ahead=1)
    dice = random.Random(5)
    shuffled = dice.sample(rows, len(rows))
    together, _ = answer(make_world(), shuffled, sizes=dice.choices(range(1, 9), k=100), max_ahead=16)
    assert alone == together


def test_a_row_that_cannot_be_answered_stops_nobody(make_world):
    world = make_world()
    wrong = {
        1: (row(1, prompt="x", model="other"), 404, "model"),
        3: (row(3, prompt=[9999]), 400, "prompt"),
        5: (row(5, prompt="one", max_tokens=5000), 400, "max_tokens"),
        7: (row(7, messages=[{"role": "user", "content": "fail"}]), 400, "messages"),
        9: (row(9, prompt="one", logit_bias={"9999": 1.0}), 400, "logit_bias"),
    }
    rows = [wrong[number][0] if number in wrong else row(number, prompt="one two") for number in range(12)]
    found, _ = answer(world, rows)
    assert sorted(found) == list(range(12))
    for number, outcome in found.items():
        if number not in wrong:
            assert outcome.status == 200
            continue
        _, status, param = wrong[number]
        error = json.loads(outcome.body)["error"]
        assert (outcome.status, error["param"]) == (status, param) and error["message"]


def test_a_fault_in_one_row_ends_that_row_only(make_world, monkeypatch):
    world = make_world()
    check = world.service.check_body

    def broken(body):
        if body.seed == 2:
            raise ArithmeticError("a secret")
        check(body)

    monkeypatch.setattr(world.service, "check_body", broken)
    found, _ = answer(world, [row(number, prompt="one") for number in range(5)])
    assert [found[number].status for number in range(5)] == [200, 200, 500, 200, 200]
    assert b"secret" not in found[2].body


def test_a_row_that_ends_ranks_is_an_error_row(make_world):
    world = make_world()

    async def go():
        answerer = answerer_of(world)
        world.executor.is_manual = True
        answerer.add([row(0, prompt="one")])
        await until_true(lambda: world.engine.snapshot().running)
        (request_id,) = world.engine._scheduler.num_ids
        world.engine._command(lambda: [world.engine._scheduler.fail(request_id, "it ended ranks", "ends_ranks")])
        (outcome,) = (await answerer.turn([], False)).outcomes
        assert outcome.status == 500 and json.loads(outcome.body)["error"]["code"] == "engine_failure"
        world.executor.is_manual = False
        world.executor.release(10)
        assert [one.status for one in (await answerer.turn([row(1, prompt="one")], False)).outcomes] == [200]
        await answerer.close()

    asyncio.run(go())


def test_rows_that_a_lost_gang_had_have_no_outcome(make_world):
    world = make_world()

    async def go():
        answerer = answerer_of(world)
        world.executor.is_manual = True
        first = await answerer.turn([row(number, prompt="one") for number in range(4)], False)
        assert not first.outcomes
        world.executor.fail(GangFailure("rank 1 died"))
        with pytest.raises(RuntimeError, match="the gang is lost: rank 1 died"):
            while True:
                assert not (await answerer.turn([], False)).outcomes
        await answerer.close()

    asyncio.run(go())


def test_nothing_wakes_up_before_an_answer_has_ended(make_world, monkeypatch):
    """A step of 64 sequences would cost as many wake-ups; rows that may end sooner are looked at."""
    world = make_world()
    wake_ups = []
    hand_over = world.outbox._hand_over
    monkeypatch.setattr(world.outbox, "_hand_over", lambda events: (wake_ups.append(events), hand_over(events)))
    answer(world, [row(number, prompt="one", max_tokens=50, ignore_eos=True) for number in range(6)])
    assert len(wake_ups) <= 6
    wake_ups.clear()
    answer(world, [row(6, **CHAT, max_tokens=50, ignore_eos=True, parallel_tool_calls=False)])
    assert len(wake_ups) > 6
    assert not world.outbox._held and not world.outbox._at_end


@pytest.fixture
def slow_world(make_world, monkeypatch):
    """One whose steps take 3 ms."""
    world = make_world()
    wait = world.executor.wait
    monkeypatch.setattr(world.executor, "wait", lambda timeout_s: (time.sleep(0.003), wait(timeout_s))[1])
    return world


def test_a_stop_string_ends_a_row_when_it_comes(slow_world):
    found, _ = answer(slow_world, [row(0, prompt=[5, 6], stop=list("eaton "), max_tokens=120, ignore_eos=True)])
    assert json.loads(found[0].body)["choices"][0]["finish_reason"] == "stop"
    assert slow_world.engine.stats.num_generated < 60


def test_it_asks_for_rows_before_it_has_none(slow_world):
    lengths = random.Random(3).choices(range(5, 20), k=200)
    rows = [row(number, prompt="one two", ignore_eos=True, max_tokens=lengths[number]) for number in range(200)]
    found, turns = answer(slow_world, rows, sizes=(), max_ahead=8)
    assert len(found) == 200
    # Something waits still, here or in the engine; the first ones are let in at once
    assert all(turn.num_wanted < 8 or turn.figures.waiting for turn in turns[1:20])
    assert sum(turn.figures.running + turn.figures.waiting == 0 for turn in turns) <= 2  # at the start and the end


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_metrics_port_that_is_taken_ends_no_gang(make_world, monkeypatch, caplog):
    monkeypatch.setattr(host_module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    actor = host_module.HostActor()
    actor._host = SimpleNamespace(service=make_world().service)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        actor._listen(port, 1)
    assert f"batch.metrics_port: gang 1 has no /metrics on port {port}" in caplog.text and "set another" in caplog.text


def test_a_host_takes_no_longer_requests_than_it_is_told(make_world):
    world, actor = make_world(), host_module.HostActor()
    actor._host = SimpleNamespace(service=world.service)
    assert asyncio.run(actor.limit(10)) == 10
    found, _ = answer(world, [row(0, prompt=list(range(1, 12))), row(1, prompt=[1, 2], max_tokens=3)])
    assert b"maximum context length is 10 tokens" in found[0].body and found[1].status == 200


def test_one_line_on_a_terminal_and_json_lines_elsewhere():
    now = [100.0]
    tally = Tally(total=1000, skipped=100)
    terminal, file = Terminal(), io.StringIO()
    shown = [Progress(tally, terminal, clock=lambda: now[0]), Progress(tally, file, clock=lambda: now[0])]
    for second in range(31):
        now[0] = 100.0 + second
        tally.completed, tally.failed = 10 * second, second // 10
        figures = [
            Figures("ready", num_prompt=400 * second, num_cached=300 * second, num_generated=640 * second, running=64),
            Figures("recovering", running=1),
        ]
        for one in shown:
            one.show(figures)
    last = terminal.getvalue().rsplit("\r\x1b[K", 1)[1]
    assert last == (
        "[########............] 403 of 1000 rows, 3 failed, 640 tokens/s, 75% of prompts cached, gang recovering, "
        "59 s left"
    )
    assert "\n" not in terminal.getvalue()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["done"] for line in lines] == [100, 201, 302, 403]  # every ten seconds
    assert lines[-1]["tokens_per_s"] == 640.0 and lines[-1]["generated_tokens"] == 19_200
    assert lines[-1]["seconds_left"] == 59 and lines[-1]["skipped"] == 100
    assert [gang["state"] for gang in lines[-1]["gangs"]] == ["ready", "recovering"]


def test_the_start_of_the_gangs_does_not_count_as_slowness():
    now, tally = [0.0], Tally(total=100)
    progress = Progress(tally, io.StringIO(), clock=lambda: now[0])
    for second in range(60):
        now[0] = float(second)
        working = max(0, second - 50)
        tally.completed = working
        progress.show([Figures("ready" if working else "starting", num_generated=100 * working)])
    assert progress.report()["tokens_per_s"] == 100.0 and progress.report()["seconds_left"] == 91


def test_what_a_lost_host_has_counted_stays_counted():
    progress = Progress(Tally(total=10), io.StringIO(), "json")
    progress.bury(Figures(num_generated=70, num_prompt=7))
    progress.show([Figures("ready", num_generated=5)])
    report = progress.report()
    assert (report["generated_tokens"], report["prompt_tokens"]) == (75, 7)
