"""/metrics: numbers that can be counted by hand, in Prometheus' format."""

import asyncio
import math
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.settings import SchedulerSettings
from actors.decisions.schedule.stats import Histogram, Stats
from actors.remote.meeting import RankInfo
from actors.words.errors import GangFailure
from actors.words.messages import Request, SamplingParams
from configs.monitoring import MonitoringConfig
from deployments.api.metric_aliases import VLLM
from deployments.api.metric_pages import merged
from deployments.api.metrics import FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS, STATES, Latencies, Stopwatch
from deployments.api.routes import build_app
from deployments.serve import peers
from deployments.serve.peers import Peers
from tests.fakes.fake_executor import FakeExecutor

COMPLETION = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
COMPLETIONS = "/v1/completions"


def scrape(world, prefix="stagemesh_"):
    """Every sample with this prefix by name and labels beside the model's and the replica's."""
    response = world.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        if not family.name.startswith(prefix):
            continue
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("replica")) == ("tiny", "replica-1")
            key = (sample.name.removeprefix(prefix), *labels.values())
            assert key not in samples
            samples[key] = sample.value
    return samples


def test_a_fresh_replica_shows_zeros(world):
    samples = scrape(world)
    assert samples["kv_blocks",] == 256
    assert samples["engine_state", "ready"] == 1
    busy = {key for key, value in samples.items() if value}
    assert busy == {("kv_blocks",), ("engine_state", "ready"), ("build_info", "0.1.0")}


def test_numbers_are_those_counted_by_hand(make_world):
    world = make_world(script=[40, 41, 42, 43, 44, 45, 46])
    twins = {"prompt": list(range(10, 60)), "n": 2, "max_tokens": 2}  # first, for nothing limits a first chunk
    for changes in (twins, {}, {}, {"stop_token_ids": [42]}):
        assert world.post(COMPLETIONS, {**COMPLETION, **changes}).status_code == 200
    world.wait_until_idle()
    samples = scrape(world)
    assert samples["prompt_tokens_total",] == samples["prefix_cache_queries_total",] == 3 * 3 + 2 * 50
    assert samples["generation_tokens_total",] == 6 + 6 + 3 + 2 * 2
    assert samples["prefix_cache_hits_total",] == 48
    assert samples["requests_finished_total", "length"] == 4
    assert samples["requests_finished_total", "stop"] == 1
    assert samples["requests_finished_total", "abort"] == samples["requests_finished_total", "error"] == 0
    assert samples["time_to_first_token_seconds_count",] == 5
    assert samples["inter_token_latency_seconds_count",] == 5 + 5 + 2 + 2
    assert samples["e2e_request_latency_seconds_count",] == samples["request_queue_time_seconds_count",] == 5
    assert samples["request_prompt_tokens_sum",] == samples["prompt_tokens_total",]
    assert samples["request_generation_tokens_sum",] == samples["generation_tokens_total",]
    assert samples["request_prompt_tokens_count",] == samples["request_generation_tokens_count",] == 5
    assert samples["http_requests_total", "/v1/completions", "200"] == 4
    assert (
        samples["steps_total",]
        == samples["step_tokens_count",]
        == len([step for step in world.executor.steps if step.entries])
    )
    assert samples["step_tokens_sum",] == sum(
        len(entry.ids) or 1 for step in world.executor.steps for entry in step.entries
    )
    assert samples["kv_blocks_used",] == samples["kv_usage_ratio",] == 0
    assert samples["kv_blocks_cached",] == 3
    assert samples["requests_running",] == samples["requests_waiting",] == 0


def test_a_failed_gang_is_seen(world):
    world.executor.fail(GangFailure("rank 1 died"))
    world.post(COMPLETIONS, COMPLETION)
    samples = scrape(world)
    assert samples["engine_state", "failed"] == 1
    assert samples["engine_state", "ready"] == 0
    assert samples["requests_finished_total", "error"] <= 1


def test_what_runs_and_waits_is_seen(make_world, scripted_executor):
    executor = scripted_executor(vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    for number in range(12):
        world.engine.add(Request(f"r{number}", [5] * 20, 9, SamplingParams(0.0)))
    while len(executor.steps) < 2:
        time.sleep(0.001)
    samples = scrape(world)
    assert samples["requests_running",] + samples["requests_waiting",] == 12
    assert 1 <= samples["requests_running",] <= 8
    assert samples["kv_usage_ratio",] == samples["kv_blocks_used",] / 256 > 0
    for number in range(12):
        world.engine.finish(f"r{number}")
    executor.release(100)
    world.wait_until_idle()
    assert scrape(world)["requests_finished_total", "abort"] == 12


def test_two_replicas_in_one_process_do_not_meet(make_world):
    first, second = make_world(), make_world()
    first.post(COMPLETIONS, COMPLETION)
    assert scrape(first)["generation_tokens_total",] == 6
    assert scrape(second)["generation_tokens_total",] == 0


def test_what_is_computed_again_after_a_preemption_counts_once():
    now = [0.0]
    stats = Stats(clock=lambda: now[0])
    settings = SchedulerSettings(block_size=4, max_num_seqs=4, max_num_batched_tokens=16, num_lanes=1)
    scheduler, executor = Scheduler(settings, num_blocks=6, stats=stats), FakeExecutor(block_size=4)
    for name in "abc":
        scheduler.add(Request(name, [1, 2, 3, 4, 5], 12, SamplingParams(0.0)))
    while scheduler.num_live:
        now[0] += 1.0
        if step := scheduler.next_step():
            executor.submit(step)
        for result in executor.wait(0):
            scheduler.complete(result)
    assert stats.num_preemptions > 0
    assert stats.num_prompt == 15
    assert stats.num_generated == 36
    assert sum(stats.queue_s.counts) == 3
    assert stats.queue_s.sum >= 3 * 1.0
    assert stats.num_finished == {"stop": 0, "length": 3, "abort": 0, "timeout": 0, "error": 0}


@pytest.mark.parametrize("value", [0, 1, 1.5, 2, 99, 100, 101, math.pi])
def test_histograms_count_at_or_below_each_bound(value):
    histogram = Histogram((1, 2, 100))
    histogram.observe(value, 3)
    below = [sum(histogram.counts[: place + 1]) for place in range(4)]
    assert below == [3 * (value <= bound) for bound in (1, 2, 100)] + [3]
    assert histogram.sum == 3 * value


def test_a_stopwatch_measures_what_a_client_waits_for():
    now = [10.0]
    latencies = Latencies()
    stopwatch = Stopwatch(latencies, 8.0, lambda: now[0])
    stopwatch.tokens(1)
    now[0] = 11.0
    stopwatch.tokens(0)
    stopwatch.tokens(2)
    now[0] = 11.25
    stopwatch.tokens(1)
    stopwatch.end()
    assert latencies.first_token_s.sum == 2.0
    assert latencies.inter_token_s.sum == 1.25
    assert sum(latencies.inter_token_s.counts) == 3
    assert latencies.request_s.sum == 3.25
    assert latencies.decode_s.sum == 1.25
    assert latencies.per_token_s.sum == pytest.approx(1.25 / 3)
    assert stopwatch.first_token_s == 2.0


@pytest.mark.parametrize("bounds", [FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS])
def test_bounds_ascend(bounds):
    assert list(bounds) == sorted(set(bounds))


def test_the_seconds_of_the_ranks_are_told_by_phase(make_world):
    info = RankInfo(3, 1, 1, "node", 7, "cpu", (0, 2), 100, 0.5, {"idle": 1.5, "compute": 2.0})
    samples = scrape(make_world(ranks=lambda: [info]))
    assert samples["rank_seconds_total", "compute", "3", "1", "1"] == 2.0
    assert samples["rank_seconds_total", "idle", "3", "1", "1"] == 1.5
    assert samples["rank_info", "cpu", "node", "3", "1", "1"] == 1
    assert samples["rank_heartbeat_age_seconds", "3", "1", "1"] == 0.5


def test_a_replica_that_drains_says_so_and_its_spares_are_told_by_stage(make_world):
    world = make_world(num_spares=lambda: [1, 0])
    world.service.is_draining = True
    samples = scrape(world)
    assert [state for state in STATES if samples["engine_state", state]] == ["draining"]
    assert world.get("/cluster").json()["state"] == "draining"
    assert (samples["spare_ranks", "0"], samples["spare_ranks", "1"]) == (1, 0)


def test_the_age_of_the_last_step_grows_while_something_waits_for_it_and_only_then(make_world, scripted_executor):
    executor = scripted_executor(vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    now = [1000.0]
    world.engine.stats.clock = lambda: now[0]
    now[0] += 500
    assert scrape(world)["step_age_seconds",] == 0
    world.engine.add(Request("r", [5] * 20, 9, SamplingParams(0.0)))
    while not executor.steps:
        time.sleep(0.001)
    now[0] += 30
    assert scrape(world)["step_age_seconds",] == 30  # since the request came, not since the replica was idle
    executor.release(1)
    while world.engine.stats.progress_at < now[0]:
        time.sleep(0.001)
    assert scrape(world)["step_age_seconds",] == 0
    now[0] += 7
    assert scrape(world)["step_age_seconds",] == 7
    world.engine.finish("r")
    executor.release(100)
    world.wait_until_idle()
    assert scrape(world)["step_age_seconds",] == 0
    assert world.engine.stats.progress_at == now[0]


def test_vllms_names_show_the_same_numbers(make_world):
    world = make_world(monitoring=MonitoringConfig(metric_aliases="vllm"))
    world.post(COMPLETIONS, COMPLETION)
    world.wait_until_idle()
    own, twins = scrape(world), scrape(world, "vllm:")
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):  # what endpoint pickers read
        assert twins[name, "0"] == 0
    assert twins["generation_tokens_total", "0"] == own["generation_tokens_total",] == 6
    assert twins["request_success_total", "0", "length"] == 1
    assert twins["iteration_tokens_total_count", "0"] == own["steps_total",]
    assert twins["time_to_first_token_seconds_bucket", "0", "+Inf"] == 1
    families = {name for name, *_ in twins}
    assert all(any(name.startswith(theirs) for name in families) for theirs in VLLM.values())
    assert scrape(make_world(), "vllm:") == {}


def test_pages_of_two_replicas_are_one_page_in_which_each_series_is_there_once(make_world):
    first, second = make_world(), make_world()
    first.post(COMPLETIONS, COMPLETION)
    first.wait_until_idle()
    pages = [world.service.metrics.page() for world in (first, second)]
    page = merged([pages[0], pages[1].replace(b'"replica-1"', b'"replica-2"')]).decode()
    found = {}
    for family in text_string_to_metric_families(page):
        assert f"# TYPE {family.name}" not in found
        found[f"# TYPE {family.name}"] = family
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    series = [key for key in found if isinstance(key, tuple)]
    assert len(series) == sum(1 for page in pages for line in page.splitlines() if not line.startswith(b"#"))
    name = "stagemesh_generation_tokens_total"
    values = [found[name, ("model_name", "tiny"), ("replica", f"replica-{number}")] for number in (1, 2)]
    assert values == [6, 0]
    assert merged(pages[:1]) == pages[0]


class Handle:
    """Stands for Serve's handle to all replicas: gives their pages, or is as late as a replica that was stopped."""

    def __init__(self, pages):
        self._pages = pages

    def broadcast(self, method):
        assert method == "metrics_page"
        return self

    async def results_async(self, timeout_s):
        if self._pages is None:
            await asyncio.sleep(timeout_s)
            raise TimeoutError
        return self._pages


@pytest.mark.parametrize("answers", [True, False])
def test_the_page_is_that_of_all_replicas_and_of_one_where_another_is_silent(make_world, monkeypatch, answers):
    monkeypatch.setattr(peers, "_ANSWER_S", 0.01)
    world = make_world()
    own = world.service.metrics.page
    replicas = Peers("metrics_page", own)
    replicas._handle = Handle([own(), own().replace(b'"replica-1"', b'"replica-2"')] if answers else None)
    world.app = build_app(world.service, metrics_of_all=replicas.metrics)
    assert world.get("/metrics").text.count("stagemesh_build_info{") == (2 if answers else 1)
    assert world.get("/metrics/replica").text.count("stagemesh_build_info{") == 1


def test_those_who_ask_at_once_get_one_page_and_it_is_kept_for_a_moment(monkeypatch):
    asked = []

    async def ask():
        asked.append(1)
        await asyncio.sleep(0.02)
        return str(len(asked)).encode()

    replicas = Peers("metrics_page", lambda: b"")
    monkeypatch.setattr(replicas, "_ask", ask)

    async def go():
        assert await asyncio.gather(*(replicas.metrics() for _ in range(50))) == [b"1"] * 50
        assert await replicas.metrics() == b"1"
        replicas._kept_until = 0
        assert await replicas.metrics() == b"2"

    asyncio.run(go())
