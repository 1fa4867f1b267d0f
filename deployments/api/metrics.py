"""Metrics: what the engine counts and how long clients wait, in Prometheus' format. Names begin with stagemesh_."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from actors.decisions.schedule.phase_clock import PHASES
from actors.decisions.schedule.stats import RECOVERY_PHASES, REQUEST_SECONDS, Histogram, KeyUsage
from actors.remote.engine import Engine
from actors.remote.meeting import RankInfo
from actors.remote.snapshot import EngineState
from deployments.api.key_limits import KeyAccounts

# Seconds; the same bounds as other engines have, so that dashboards can show them side by side.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
INTER_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
CONTENT_TYPE = CONTENT_TYPE_LATEST
STATES: tuple[EngineState, ...] = ("starting", "ready", "recovering", "failed", "stopped")


class Latencies:
    """How long clients wait. Written in the event loop's thread."""

    def __init__(self) -> None:
        self.first_token_s = Histogram(FIRST_TOKEN_SECONDS)
        self.inter_token_s = Histogram(INTER_TOKEN_SECONDS)
        self.request_s = Histogram(REQUEST_SECONDS)


class Stopwatch:
    """Measures one answer where its tokens are handed to the client."""

    def __init__(self, latencies: Latencies, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`began`: when the request was parsed, in seconds of `clock`; tokenizing and queueing count as waiting."""
        self._latencies = latencies
        self._began = began
        self._clock = clock
        self._last_token: float | None = None

    def tokens(self, count: int) -> None:
        """Count tokens that arrive now; those that arrive together share the time since the ones before."""
        if not count:
            return
        now = self._clock()
        if self._last_token is None:
            self._latencies.first_token_s.observe(now - self._began)
            if count > 1:
                self._latencies.inter_token_s.observe(0.0, count - 1)
        else:
            self._latencies.inter_token_s.observe((now - self._last_token) / count, count)
        self._last_token = now

    def end(self) -> None:
        """The answer is complete. To be called for complete answers only, not for cancelled or failed ones."""
        self._latencies.request_s.observe(self._clock() - self._began)


class Metrics:
    """All metrics of one replica, in a registry of its own. Numbers are read when the page is asked for."""

    def __init__(
        self,
        engine: Engine,
        latencies: Latencies,
        model: str,
        ranks: Callable[[], Sequence[RankInfo]],
        accounts: KeyAccounts,
    ) -> None:
        self._accounts = accounts
        self._ranks = ranks
        self._engine = engine
        self._latencies = latencies
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def page(self) -> bytes:
        """The page that /metrics answers, in Prometheus' text format."""
        return generate_latest(self._registry)

    def listen(self, address: str, port: int) -> None:
        """Answer /metrics where there is no HTTP app; in a thread, until the process ends."""
        start_http_server(port, address, self._registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics, as prometheus_client asks a collector for them."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        engine = self._engine.snapshot()
        share = engine.blocks_used / engine.blocks_total
        gauges: list[tuple[str, str, float]] = [
            ("requests_running", "Sequences that are being computed", engine.running),
            ("requests_waiting", "Sequences that wait for a lane or for KV blocks", engine.waiting),
            ("kv_blocks", "KV blocks of the gang", engine.blocks_total),
            ("kv_blocks_used", "KV blocks held by live sequences", engine.blocks_used),
            ("kv_blocks_cached", "KV blocks kept only for reuse", engine.blocks_cached),
            ("kv_usage_ratio", "Share of the KV blocks that live sequences hold, from 0 to 1", share),
            ("graph_shapes", "Shapes of steps that can be captured in graphs", engine.graphs.num_shapes),
            ("graph_shapes_captured", "Shapes of steps that are captured in graphs", engine.graphs.num_captured),
            ("engine_epoch", "Generation of the gang", engine.epoch),
        ]
        for name, words, value in gauges:
            gauge = GaugeMetricFamily(f"stagemesh_{name}", words, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        states = GaugeMetricFamily(
            "stagemesh_engine_state", "1 for the state that the engine is in", labels=["model_name", "state"]
        )
        for state in STATES:
            states.add_metric([self._model, state], state == engine.state)
        yield states

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        counters = [
            ("prompt_tokens", "Prompt tokens of requests that have begun to run", stats.num_prompt),
            ("generation_tokens", "Tokens generated", stats.num_generated),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.num_prompt),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.num_prompt_cached),
            ("preemptions", "Times that a sequence gave up its KV blocks to an older one", stats.num_preemptions),
            ("steps", "Steps given to the gang", stats.num_steps),
            (
                "requests_replayed",
                "Times that a running sequence was computed again in another epoch",
                stats.num_replayed,
            ),
            ("tokens_replayed", "Tokens of replayed sequences that were computed again", stats.num_replayed_tokens),
        ]
        for name, words, value in counters:
            counter = CounterMetricFamily(f"stagemesh_{name}", words, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        words = "Sequences that ended, by reason"
        yield self._labelled("requests_finished", words, "finished_reason", stats.num_finished)
        phases = "; ".join(map(": ".join, RECOVERY_PHASES.items()))
        yield self._labelled("gang_rebuilds", "Epochs that ended with a failure, by cause", "cause", stats.num_rebuilds)
        yield self._labelled("recovery_seconds", f"Seconds that recoveries took: {phases}", "phase", stats.recovery_s)
        yield self._rank_seconds()
        yield from self._of_keys()

    def _of_keys(self) -> Iterator[Metric]:
        """What each API key has used: as many series as there are keys in the file, and none without keys."""
        accounts = {account.name: account for account in self._accounts.all()}
        usage = {name: self._engine.stats.by_key.get(name, KeyUsage()) for name in accounts}
        counters: list[tuple[str, str, dict[str, float]]] = [
            ("requests", "Requests with an API key", {name: one.num_requests for name, one in accounts.items()}),
            (
                "refused",
                "Requests above a limit of their key",
                {name: one.num_refused for name, one in accounts.items()},
            ),
            ("prompt_tokens", "Prompt tokens by key", {name: one.num_prompt for name, one in usage.items()}),
            ("cached_tokens", "Those of them that were cached", {name: one.num_cached for name, one in usage.items()}),
            ("generation_tokens", "Tokens generated by key", {name: one.num_generated for name, one in usage.items()}),
        ]
        for name, words, values in counters:
            yield self._labelled(f"key_{name}", words, "key", values)

    def _labelled(self, name: str, words: str, label: str, values: Mapping[Any, float]) -> Metric:
        counter = CounterMetricFamily(f"stagemesh_{name}", words, labels=["model_name", label])
        for value, count in values.items():
            counter.add_metric([self._model, value], count)
        return counter

    def _rank_seconds(self) -> Metric:
        labels = ["model_name", "rank", "stage", "shard", "phase"]
        words = "Where the time of a rank goes, since it joined its gang: " + "; ".join(map(": ".join, PHASES.items()))
        counter = CounterMetricFamily("stagemesh_rank_seconds", words, labels=labels)
        for info in self._ranks():
            for phase, seconds in info.seconds.items():
                counter.add_metric([self._model, str(info.rank), str(info.stage), str(info.shard), phase], seconds)
        return counter

    def _histograms(self) -> Iterator[Metric]:
        stats, latencies = self._engine.stats, self._latencies
        histograms = [
            ("time_to_first_token_seconds", "From a request to its first token", latencies.first_token_s),
            ("inter_token_latency_seconds", "From one token to the next", latencies.inter_token_s),
            ("e2e_request_latency_seconds", "From a request to the end of its answer", latencies.request_s),
            ("request_queue_time_seconds", "From a request to its first step", stats.queue_s),
            ("step_tokens", "Tokens of a step, those of prompts included", stats.step_tokens),
        ]
        for name, words, histogram in histograms:
            family = HistogramMetricFamily(f"stagemesh_{name}", words, labels=["model_name"])
            family.add_metric([self._model], _buckets(histogram), histogram.sum)
            yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """(bound, how many observations are at or below it), as Prometheus counts."""
    total, buckets = 0, []
    for bound, count in zip([*map(float, histogram.bounds), float("inf")], list(histogram.counts), strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
    return buckets
