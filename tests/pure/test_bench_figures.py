"""The formulas of a load test, on timelines whose results are exact; what it asks, and when."""

import dataclasses
import json
import math
import random
import sys
from itertools import islice
from pathlib import Path

import pytest

from deployments.bench.figures import Figures, Load, Spread, Timeline, figures, percentile, spread
from deployments.bench.load import CHAT, COMPLETIONS, RandomPrompts, arrivals_s, read_conversations, words
from deployments.bench.plot import check_plot, write_plot
from deployments.bench.scaling import BatchSpeed, LayoutFigures, OfflineReport, Round, scaling, speed_of
from deployments.bench.scaling import as_text as offline_text
from deployments.bench.text import OnlineReport, as_text

# Powers of two: every sum and quotient is exact
FIRST = Timeline(sent_s=8.0, chunks_s=[8.5, 8.75, 9.25], ended_s=9.25, prompt_tokens=10, output_tokens=4)
SECOND = Timeline(sent_s=8.5, chunks_s=[9.5], ended_s=9.5, prompt_tokens=6, output_tokens=1)
FAILED = Timeline(sent_s=9.0, chunks_s=[9.5], ended_s=12.0, error="HTTP 503: full")


def found(*timelines: Timeline, cpu_s: float = 0.5, **limits: float) -> Figures:
    return figures(Load(concurrency=2), timelines, cpu_s, limits)


def test_every_figure_is_what_its_formula_says() -> None:
    said = found(FIRST, SECOND, FAILED, ttft_ms=500, tpot_ms=250)
    assert (said.completed, said.failed, said.failures) == (2, 1, {"HTTP 503: full": 1})
    assert said.duration_s == 4.0, "from the first request to the end of the last answer, failed ones included"
    assert (said.prompt_tokens, said.output_tokens) == (16, 5)
    assert said.requests_per_s == 2 / 4
    assert said.output_tokens_per_s == 5 / 4
    assert said.total_tokens_per_s == 21 / 4
    assert said.mean_concurrency == (1.25 + 1.0 + 3.0) / 4
    assert said.client_cpu_share == 0.5 / 4
    assert said.tokens_per_chunk == 5 / 4
    assert said.ttft_ms == Spread(750, 750, 950, 995)
    assert said.tpot_ms == Spread(250, 250, 250, 250), "(1.25 - 0.5) / 3; one token alone has none"
    assert said.itl_ms == Spread(375, 375, pytest.approx(475), pytest.approx(497.5))
    assert said.e2e_ms == Spread(1125, 1125, 1225, pytest.approx(1247.5))
    assert said.goodput_per_s == 1 / 4, "the second takes 1000 ms to its first token"


def test_a_limit_is_kept_when_it_is_met_exactly_and_one_token_keeps_every_tpot() -> None:
    assert found(SECOND, tpot_ms=0.001).goodput_per_s == 1
    assert found(FIRST, e2e_ms=1250).goodput_per_s == 1 / 1.25
    assert found(FIRST, e2e_ms=1249.9).goodput_per_s == 0
    assert found(FIRST).goodput_per_s is None


def test_without_usage_chunks_are_counted_and_prompts_are_not_made_up() -> None:
    bare = dataclasses.replace(FIRST, prompt_tokens=None, output_tokens=None)
    said = found(bare)
    assert (said.output_tokens, said.prompt_tokens, said.total_tokens_per_s) == (3, None, None)
    assert found(bare, SECOND).prompt_tokens is None


def test_when_all_fail_there_is_no_latency() -> None:
    said = found(FAILED, FAILED)
    assert (said.completed, said.ttft_ms, said.output_tokens_per_s, said.failures) == (0, None, 0, {FAILED.error: 2})


def test_percentiles_are_those_of_numpy() -> None:
    import numpy as np

    rng = random.Random(1)
    for count in (1, 2, 7, 100):
        values = sorted(rng.random() for _ in range(count))
        for share in (0.0, 0.5, 0.9, 0.99, 1.0):
            assert percentile(values, share) == pytest.approx(float(np.percentile(values, share * 100)))
    assert spread([]) is None


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps: mean 1 / rate, deviation as large, and memoryless; in unit windows as many on average as the variance."""
    rate, count = 8.0, 20_000
    times = list(islice(arrivals_s(rate, seed=3), count))
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / count
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / count)
    assert mean == pytest.approx(1 / rate, rel=5 / math.sqrt(count))
    assert deviation == pytest.approx(1 / rate, rel=0.05)
    longer = [gap for gap in gaps if gap > 1 / rate]
    assert len(longer) / count == pytest.approx(math.exp(-1), abs=0.02)
    assert sum(gap > 2 / rate for gap in gaps) / len(longer) == pytest.approx(math.exp(-1), abs=0.03)
    windows = [0] * int(times[-1])
    for time_s in times:
        if time_s < len(windows):
            windows[int(time_s)] += 1
    average = sum(windows) / len(windows)
    variance = sum((number - average) ** 2 for number in windows) / len(windows)
    assert variance / average == pytest.approx(1, abs=0.15)
    assert times[:9] == list(islice(arrivals_s(rate, seed=3), 9)) != list(islice(arrivals_s(rate, seed=4), 9))


def test_random_prompts_have_their_lengths_and_share_what_they_should() -> None:
    prompts = RandomPrompts(seed=1, input_len=20, prefix_len=7, num_prefixes=2, ids=range(50, 90))
    asks = [prompts.ask(0, index) for index in range(4)]
    ids = [ask.fields["prompt"] for ask in asks]
    assert {ask.path for ask in asks} == {COMPLETIONS}
    assert {len(one) for one in ids} == {27} == {ask.prompt_tokens for ask in asks}
    assert set().union(*ids) <= set(range(50, 90))
    assert ids[0][:7] == ids[2][:7] != ids[1][:7] == ids[3][:7]
    assert len({tuple(one[7:]) for one in ids}) == 4
    assert prompts.ask(0, 1) == asks[1] and prompts.ask(1, 1) != asks[1], "another level, other prompts"
    assert prompts.ask(1, 1).fields["prompt"][:7] == ids[1][:7], "but the same shared prefix"
    assert RandomPrompts(2, 20, ids=range(50, 90)).ask(0, 1) != RandomPrompts(1, 20, ids=range(50, 90)).ask(0, 1)


def test_words_where_ids_are_not_known() -> None:
    text = RandomPrompts(seed=1, input_len=5, prefix_len=2).ask(0, 0)
    chat = RandomPrompts(seed=1, input_len=5, prefix_len=2, is_chat=True).ask(0, 0)
    assert len(text.fields["prompt"].split()) == 7 and text.prompt_tokens is None
    assert (chat.path, chat.fields["messages"]) == (CHAT, [{"role": "user", "content": text.fields["prompt"]}])
    assert len(set(words(random.Random(0), 100))) > 90


def test_conversations_end_with_the_user(tmp_path: Path) -> None:
    def said(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]

    file = tmp_path / "talk.jsonl"
    lines = [said("system", "user"), {"messages": said("user", "assistant", "user", "assistant")}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    found = read_conversations(file)
    asked = [found.ask(0, index).fields["messages"] for index in range(3)]
    assert asked == [said("system", "user"), said("user", "assistant", "user"), said("system", "user")]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("no json", ":2: a line is a list of messages"),
        ('{"prompt": "x"}', ":2: a line is a list of messages"),
        ('[{"role": "user"}]', ':2: a line is a list of messages or an object with "messages", each with'),
        ('[{"role": "assistant", "content": "x"}]', ":2: no message of the user"),
    ],
)
def test_a_wrong_conversation_is_named_by_its_line(line: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text('[{"role": "user", "content": "x"}]\n' + line)
    with pytest.raises(ValueError, match=r"talk\.jsonl") as raised:
        read_conversations(file)
    assert named in str(raised.value)


def test_files_without_conversations(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, words_of_it in (("empty", "is empty"), ("absent", "cannot be read")):
        with pytest.raises(ValueError, match=f"--conversations: .*{name} {words_of_it}"):
            read_conversations(tmp_path / name)


def a_report(*found_ones: Figures, limits: dict[str, float] | None = None) -> OnlineReport:
    return OnlineReport("http://x", "m", "64 random token ids", 64, True, 0.0, 1, limits or {}, found_ones)


def test_people_read_failures_and_what_makes_figures_doubtful() -> None:
    bare = dataclasses.replace(FIRST, prompt_tokens=None, output_tokens=None)
    text = as_text(a_report(found(bare, FAILED, cpu_s=3.9), found(FIRST)))
    assert "c=2: 1 x HTTP 503: full" in text
    assert "the server sends no usage" in text
    assert "the load client itself took 98% of a core" in text
    assert "up to 1.3 tokens come in one chunk" in text
    assert max(map(len, text.splitlines())) <= 100
    quiet = as_text(a_report(found(dataclasses.replace(FIRST, output_tokens=3))))
    assert "Failed" not in quiet and "  - " not in quiet


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_one(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"latency{suffix}"
    ones = [dataclasses.replace(found(FIRST, SECOND), concurrency=c, output_tokens_per_s=10.0 * c) for c in (1, 8, 32)]
    failed = dataclasses.replace(found(FAILED), concurrency=64)
    check_plot(path, 4)
    write_plot(a_report(*ones, failed), path)
    written = path.read_bytes()
    if suffix == ".png":
        assert written.startswith(b"\x89PNG\r\n") and written.endswith(b"IEND\xaeB`\x82") and len(written) > 20_000
    else:
        import xml.etree.ElementTree as ET

        assert ET.fromstring(written).tag == "{http://www.w3.org/2000/svg}svg" and len(written) > 20_000


@pytest.mark.parametrize(
    ("name", "num_loads", "named"),
    [("x.pdf", 2, "must end in .png or .svg"), ("no/x.png", 2, "the folder of"), ("x.svg", 1, "one load is one point")],
)
def test_a_picture_that_cannot_be_is_refused_before_the_load(
    name: str, num_loads: int, named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"--plot: .*{named}"):
        check_plot(tmp_path / name, num_loads)


def test_without_matplotlib_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[bench\]'"):
        check_plot(tmp_path / "x.png", 2)


# -- offline -----------------------------------------------------------------------------------------------------

ONE_ROUND = Round(((1.0, 3.0, 4.0, 5.0), (2.0, 4.0, 6.0, 8.0)))


def test_prefill_and_decode_are_timed_apart() -> None:
    assert ONE_ROUND.prefill_tokens_per_s(input_len=8) == 16 / 2, "until the last first token"
    assert ONE_ROUND.decode_tokens_per_s() == 4 / (5 - 2), "3, 4, 5 and 4, while both decode"
    with pytest.raises(ValueError, match="--output-len: the first sequence ends before"):
        Round(((1.0, 2.0), (3.0, 4.0))).decode_tokens_per_s()


def test_medians_of_rounds() -> None:
    slow = Round(((4.0, 6.0, 8.0, 10.0),))
    fast = Round(((1.0, 2.0, 3.0, 4.0),))
    speed = speed_of(1, 8, [slow, fast, fast], (None, None))
    assert speed == BatchSpeed(1, 8, 1, None, None)
    assert speed.ms_per_token == 1000


def test_scaling_is_against_the_first_layout() -> None:
    def layout(tp: int, pp: int, rate: float) -> LayoutFigures:
        speeds = (BatchSpeed(1, 10 * rate, rate, None, 1000.0),)
        return LayoutFigures(tp, pp, 9.0, 1.0, 16, (4000,) * tp * pp, (2000,) * tp * pp, (None,) * tp * pp, speeds)

    layouts = (layout(1, 2, 100.0), layout(2, 2, 150.0), layout(1, 1, 80.0))
    rows = scaling(layouts, 1, lambda speed: speed.decode_tokens_per_s)
    assert [(str(one), found.speed_up, found.efficiency) for one, _, found in rows] == [
        ("1 x 2", 1.0, 1.0),
        ("2 x 2", 1.5, 0.75),
        ("1 x 1", 0.8, 1.6),
    ]
    text = offline_text(OfflineReport("m", "cuda", "bfloat16", 8, 8, 3, 1, "h200", layouts))
    assert "h200 at best" in text and "10%" in text and "150" in text
    assert max(map(len, text.splitlines())) <= 100
