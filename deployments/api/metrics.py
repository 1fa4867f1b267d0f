"""Metrics: what the engine counts and how long clients wait, in Prometheus' format. Names begin with stagemesh_."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from actors.decisions.schedule.phase_clock import PHASES
from actors.decisions.schedule.stats import RECOVERY_PHASES, REQUEST_SECONDS, Histogram, KeyUsage
from actors.remote.engine import Engine
from actors.remote.meeting import RankInfo
from deployments.api.key_limits import KeyAccounts
from deployments.api.metric_aliases import vllm_twin

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
STATES = ("starting", "ready", "recovering", "draining", "failed", "stopped")
_OF_ALL = ("model_name", "replica")  # labels of every series
_RANK = ("rank", "stage", "shard")
_Of = TypeVar("_Of")
_Values = Mapping[Any, _Of]  # by the values of the labels beside those of all, a tuple


class Latencies:
    """How long clients wait, and what they were answered. Written in the event loop's thread."""

    def __init__(self) -> None:
        self.first_token_s = Histogram(FIRST_TOKEN_SECONDS)
        self.inter_token_s = Histogram(INTER_TOKEN_SECONDS)
        self.per_token_s = Histogram(INTER_TOKEN_SECONDS)
        self.decode_s = Histogram(REQUEST_SECONDS)
        self.request_s = Histogram(REQUEST_SECONDS)
        self.num_answered: Counter[tuple[str, int]] = Counter()  # HTTP requests by route and status


class Stopwatch:
    """Measures one answer where its tokens are handed to the client."""

    def __init__(self, latencies: Latencies, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`began`: when the request was parsed, in seconds of `clock`; tokenizing and queueing count as waiting."""
        self._latencies = latencies
        self._began = began
        self._clock = clock
        self._num_tokens = 0
        self._last_token: float | None = None
        self.first_token_s: float | None = None  # how long it was waited for

    def tokens(self, count: int) -> None:
        """Count tokens that arrive now; those that arrive together share the time since the ones before."""
        if not count:
            return
        now = self._clock()
        self._num_tokens += count
        if self._last_token is None:
            self.first_token_s = now - self._began
            self._latencies.first_token_s.observe(self.first_token_s)
            if count > 1:
                self._latencies.inter_token_s.observe(0.0, count - 1)
        else:
            self._latencies.inter_token_s.observe((now - self._last_token) / count, count)
        self._last_token = now

    def end(self) -> None:
        """The answer is complete. To be called for complete answers only, not for cancelled or failed ones."""
        request_s = self._clock() - self._began
        self._latencies.request_s.observe(request_s)
        if self.first_token_s is not None:
            decode_s = request_s - self.first_token_s
            self._latencies.decode_s.observe(decode_s)
            if self._num_tokens > 1:
                self._latencies.per_token_s.observe(decode_s / (self._num_tokens - 1))


@dataclass(frozen=True)
class Labels:
    """What tells the series of one replica from those of others: every series has these labels."""

    model: str
    replica: str
    version: str


class Metrics:
    """All metrics of one replica, in a registry of its own. Numbers are read when the page is asked for."""

    def __init__(
        self,
        engine: Engine,
        latencies: Latencies,
        labels: Labels,
        ranks: Callable[[], Sequence[RankInfo]],
        accounts: KeyAccounts,
        state: Callable[[], str],
        num_spares: Callable[[], Sequence[int]],
        aliases: Literal["none", "vllm"],
    ) -> None:
        """`state` is one of STATES; `num_spares` gives the processes of each stage that can take a rank over."""
        self._accounts = accounts
        self._engine = engine
        self._latencies = latencies
        self._labels = labels
        self._ranks = ranks
        self._state = state
        self._num_spares = num_spares
        self._aliases = aliases
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
        for family in (*self._gauges(), *self._of_ranks(), *self._counters(), *self._histograms()):
            yield family
            if self._aliases == "vllm" and (twin := vllm_twin(family)):
                yield twin

    def _gauges(self) -> Iterator[Metric]:
        engine = self._engine.snapshot()
        share = engine.blocks_used / engine.blocks_total
        is_busy = engine.running or engine.waiting
        age_s = max(0.0, self._engine.stats.clock() - self._engine.stats.progress_at) if is_busy else 0.0
        gauges: list[tuple[str, str, float]] = [
            ("requests_running", "Sequences that are being computed", engine.running),
            ("requests_waiting", "Sequences that wait for a lane or for KV blocks", engine.waiting),
            ("step_age_seconds", "Since the ranks' last result while sequences run or wait; 0 without any", age_s),
            ("kv_blocks", "KV blocks of the gang", engine.blocks_total),
            ("kv_blocks_used", "KV blocks held by live sequences", engine.blocks_used),
            ("kv_blocks_cached", "KV blocks kept only for reuse", engine.blocks_cached),
            ("kv_usage_ratio", "Share of the KV blocks that live sequences hold, from 0 to 1", share),
            ("graph_shapes", "Shapes of steps that can be captured in graphs", engine.graphs.num_shapes),
            ("graph_shapes_captured", "Shapes of steps that are captured in graphs", engine.graphs.num_captured),
            ("engine_epoch", "Generation of the gang", engine.epoch),
        ]
        for name, words, value in gauges:
            yield self._gauge(name, words, (), {(): value})
        state = self._state()
        words = "1 for the state that the replica is in"
        yield self._gauge("engine_state", words, ("state",), {(one,): one == state for one in STATES})
        spares = {(str(stage),): count for stage, count in enumerate(self._num_spares())}
        yield self._gauge("spare_ranks", "Processes that wait to take a rank over", ("stage",), spares)
        yield self._gauge("build_info", "1, by version", ("version",), {(self._labels.version,): 1})

    def _of_ranks(self) -> Iterator[Metric]:
        ranks = {(str(info.rank), str(info.stage), str(info.shard)): info for info in self._ranks()}
        where = {(*rank, info.node, info.device): 1 for rank, info in ranks.items()}
        yield self._gauge("rank_info", "1, by where a rank runs", (*_RANK, "node", "device"), where)
        ages = {rank: info.heartbeat_age_s for rank, info in ranks.items() if info.heartbeat_age_s is not None}
        yield self._gauge("rank_heartbeat_age_seconds", "Since a rank was heard", _RANK, ages)
        words = "Where the time of a rank goes, since it joined its gang: " + "; ".join(map(": ".join, PHASES.items()))
        seconds = {(*rank, phase): value for rank, info in ranks.items() for phase, value in info.seconds.items()}
        yield self._counter("rank_seconds", words, (*_RANK, "phase"), seconds)

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        replayed = "Times that a running sequence was computed again in another epoch"
        counters = [
            ("prompt_tokens", "Prompt tokens of requests that have begun to run", stats.num_prompt),
            ("generation_tokens", "Tokens generated", stats.num_generated),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.num_prompt),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.num_prompt_cached),
            ("preemptions", "Times that a sequence gave up its KV blocks to an older one", stats.num_preemptions),
            ("steps", "Steps given to the gang", stats.num_steps),
            ("requests_replayed", replayed, stats.num_replayed),
            ("tokens_replayed", "Tokens of replayed sequences that were computed again", stats.num_replayed_tokens),
        ]
        for name, words, value in counters:
            yield self._counter(name, words, (), {(): value})
        finished = {(str(reason),): count for reason, count in stats.num_finished.items()}
        yield self._counter("requests_finished", "Sequences that ended, by reason", ("finished_reason",), finished)
        causes = {(str(cause),): count for cause, count in stats.num_rebuilds.items()}
        yield self._counter("gang_rebuilds", "Epochs that ended with a failure, by cause", ("cause",), causes)
        answered = {(route, str(status)): count for (route, status), count in self._latencies.num_answered.items()}
        words = "HTTP requests, by route and status; 499: the client left"
        yield self._counter("http_requests", words, ("route", "status"), answered)
        yield from self._of_keys()

    def _of_keys(self) -> Iterator[Metric]:
        """What each API key has used: series of each that was ever used, also once it is out of the file."""
        accounts = {(account.name,): account for account in self._accounts.all()}
        usage = {key: self._engine.stats.by_key.get(*key, KeyUsage()) for key in accounts}
        counters: list[tuple[str, str, _Values[float]]] = [
            ("requests", "Requests with an API key", {key: one.num_requests for key, one in accounts.items()}),
            ("refused", "Requests above a limit of their key", {key: one.num_refused for key, one in accounts.items()}),
            ("prompt_tokens", "Prompt tokens by key", {key: one.num_prompt for key, one in usage.items()}),
            ("cached_tokens", "Those of them that were cached", {key: one.num_cached for key, one in usage.items()}),
            ("generation_tokens", "Tokens generated by key", {key: one.num_generated for key, one in usage.items()}),
        ]
        for name, words, values in counters:
            yield self._counter(f"key_{name}", words, ("key",), values)

    def _histograms(self) -> Iterator[Metric]:
        stats, latencies = self._engine.stats, self._latencies
        histograms = [
            ("time_to_first_token_seconds", "From a request to its first token", latencies.first_token_s),
            ("inter_token_latency_seconds", "From one token to the next", latencies.inter_token_s),
            (
                "request_time_per_output_token_seconds",
                "From one token to the next, an answer's mean",
                latencies.per_token_s,
            ),
            ("e2e_request_latency_seconds", "From a request to the end of its answer", latencies.request_s),
            ("request_decode_time_seconds", "From an answer's first token to its end", latencies.decode_s),
            ("request_queue_time_seconds", "From a request to its first step", stats.queue_s),
            ("request_prompt_tokens", "Prompt tokens of a sequence", stats.prompt_tokens),
            ("request_generation_tokens", "Tokens generated of a sequence that has ended", stats.generated_tokens),
            ("step_tokens", "Tokens of a step, those of prompts included", stats.step_tokens),
        ]
        for name, words, histogram in histograms:
            yield self._histogram(name, words, (), {(): histogram})
        phases = "; ".join(map(": ".join, RECOVERY_PHASES.items()))
        by_phase = {(phase,): histogram for phase, histogram in stats.recovery_s.items()}
        yield self._histogram("recovery_seconds", f"Seconds that a recovery took: {phases}", ("phase",), by_phase)

    def _gauge(self, name: str, words: str, labels: tuple[str, ...], values: _Values[float]) -> Metric:
        family = GaugeMetricFamily(f"stagemesh_{name}", words, labels=(*_OF_ALL, *labels))
        for of_series, value in values.items():
            family.add_metric([self._labels.model, self._labels.replica, *of_series], value)
        return family

    def _counter(self, name: str, words: str, labels: tuple[str, ...], values: _Values[float]) -> Metric:
        family = CounterMetricFamily(f"stagemesh_{name}", words, labels=(*_OF_ALL, *labels))
        for of_series, value in values.items():
            family.add_metric([self._labels.model, self._labels.replica, *of_series], value)
        return family

    def _histogram(self, name: str, words: str, labels: tuple[str, ...], values: _Values[Histogram]) -> Metric:
        family = HistogramMetricFamily(f"stagemesh_{name}", words, labels=(*_OF_ALL, *labels))
        for of_series, value in values.items():
            family.add_metric([self._labels.model, self._labels.replica, *of_series], _buckets(value), value.sum)
        return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """(bound, how many observations are at or below it), as Prometheus counts."""
    total, buckets = 0, []
    for bound, count in zip([*map(float, histogram.bounds), float("inf")], list(histogram.counts), strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
    return buckets
