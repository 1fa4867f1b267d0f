"""The figures of a load test, from when each chunk came: TTFT, TPOT, ITL, throughput and goodput. Pure arithmetic.

Formulas as `vllm bench serve` has them, over the requests that completed:
    TTFT        first token - request sent
    latency     last token - request sent (end to end)
    TPOT        (latency - TTFT) / (output tokens - 1), of requests with two tokens or more
    ITL         every gap between two chunks of one stream, all streams together
    requests/s, tokens/s   counts / seconds from the first request sent to the last answer's end, failed ones included
    goodput     requests that keep every limit / the same seconds; TPOT of a single token counts as 0
    percentiles by linear interpolation, as numpy's
Tokens are counted by the server's `usage`; without one each chunk counts as a token. GenAI-Perf's ITL is what is called
TPOT here, and where a chunk carries several tokens the gaps are longer than a token takes: see `tokens_per_chunk`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

LIMITS = ("ttft_ms", "tpot_ms", "e2e_ms")  # latencies that goodput may limit


@dataclass(slots=True)
class Timeline:
    """One request as its client saw it; all times in seconds of one clock."""

    sent_s: float
    chunks_s: list[float] = field(default_factory=list)  # when each chunk with a token came
    ended_s: float = 0.0  # when the answer was over, or failed
    prompt_tokens: int | None = None
    output_tokens: int | None = None  # by the server's usage
    error: str = ""  # why it failed; empty: it completed

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.chunks_s[0] - self.sent_s

    @property
    def latency_s(self) -> float:
        """End to end: to the last token."""
        return self.chunks_s[-1] - self.sent_s

    @property
    def num_tokens(self) -> int:
        """Output tokens by usage, else by chunks."""
        return len(self.chunks_s) if self.output_tokens is None else self.output_tokens

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is no second."""
        return (self.latency_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """The load on a server: a number of clients that each wait for their answer, or of arrivals a second."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"c={self.concurrency}" if self.concurrency else f"{self.rate:g}/s"


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of one kind of latency, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """Everything measured under one load."""

    concurrency: int | None
    rate: float | None
    completed: int
    failed: int
    failures: dict[str, int]  # how many by reason
    duration_s: float
    mean_concurrency: float  # requests in flight, averaged over the duration
    prompt_tokens: int | None  # None: neither the client nor the server counts them
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None  # prompts included
    goodput_per_s: float | None  # requests; None: no limits given
    ttft_ms: Spread | None  # None: no request completed
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    tokens_per_chunk: float
    client_cpu_share: float  # of one core that the load client took: near 1, the client is what is measured

    @property
    def load(self) -> Load:
        """The load that was asked for."""
        return Load(self.concurrency, self.rate)


def figures(
    load: Load, timelines: Sequence[Timeline], client_cpu_s: float, limits: dict[str, float] | None = None
) -> Figures:
    """The Figures of all requests of one load; `limits` are milliseconds by the names in LIMITS."""
    duration_s = max(one.ended_s for one in timelines) - min(one.sent_s for one in timelines)
    done = [one for one in timelines if not one.error]
    output_tokens = sum(one.num_tokens for one in done)
    counted = [one.prompt_tokens for one in done if one.prompt_tokens is not None]
    prompt_tokens = sum(counted) if len(counted) == len(done) else None
    chunks = sum(len(one.chunks_s) for one in done)
    good = sum(keeps(one, limits) for one in done) if limits else None
    return Figures(
        concurrency=load.concurrency,
        rate=load.rate,
        completed=len(done),
        failed=len(timelines) - len(done),
        failures=dict(Counter(one.error for one in timelines if one.error).most_common()),
        duration_s=duration_s,
        mean_concurrency=sum(one.ended_s - one.sent_s for one in timelines) / duration_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=None if prompt_tokens is None else (prompt_tokens + output_tokens) / duration_s,
        goodput_per_s=None if good is None else good / duration_s,
        ttft_ms=spread([one.ttft_s for one in done]),
        tpot_ms=spread([one.tpot_s for one in done if one.tpot_s is not None]),
        itl_ms=spread([gap for one in done for gap in one.gaps_s]),
        e2e_ms=spread([one.latency_s for one in done]),
        tokens_per_chunk=output_tokens / chunks if chunks else 0.0,
        client_cpu_share=client_cpu_s / duration_s,
    )


def keeps(timeline: Timeline, limits: dict[str, float]) -> bool:
    """Whether a completed request stays within every limit."""
    took_s = {"ttft_ms": timeline.ttft_s, "tpot_ms": timeline.tpot_s or 0.0, "e2e_ms": timeline.latency_s}
    return all(took_s[name] * 1e3 <= limit_ms for name, limit_ms in limits.items())


def spread(seconds: Sequence[float]) -> Spread | None:
    """Mean and percentiles in milliseconds; None of an empty list."""
    if not seconds:
        return None
    ascending = sorted(one * 1e3 for one in seconds)
    return Spread(sum(ascending) / len(ascending), *(percentile(ascending, share) for share in (0.5, 0.9, 0.99)))


def percentile(ascending: Sequence[float], share: float) -> float:
    """A percentile of sorted values, interpolated linearly between the two nearest; `share` from 0 to 1."""
    at = share * (len(ascending) - 1)
    below = int(at)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (at - below) * (ascending[above] - ascending[below])
