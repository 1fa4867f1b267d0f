"""Makes the Grafana dashboard, k8s/monitoring/dashboard.json, from the panels below.

    python k8s/dashboard.py

tests/pure/test_dashboard.py fails while the file says something else, or a panel asks for a series that nobody has.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.decisions.schedule.phase_clock import BUBBLE

OUT = Path(__file__).parent / "monitoring" / "dashboard.json"
SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
VARIABLES = ("namespace", "model_name", "replica")
_OF = ",".join(f'{name}=~"${name}"' for name in VARIABLES)
_WIDTH, _HEIGHT, _IN_A_ROW = 8, 7, 3


@dataclass(frozen=True)
class Panel:
    """One panel: its queries, each with the words for what it shows."""

    title: str
    words: str
    unit: str  # Grafana's name
    queries: tuple[tuple[str, str], ...]  # (PromQL, legend)
    kind: str = "timeseries"
    is_stacked: bool = False


def series(name: str, labels: str = "") -> str:
    """A selector of one of our metrics, of what the variables choose."""
    return f"stagemesh_{name}{{{_OF}{',' if labels else ''}{labels}}}"


def rate(name: str, labels: str = "") -> str:
    """How fast a counter grows."""
    return f"rate({series(name, labels)}[$__rate_interval])"


def increase(name: str) -> str:
    """By how much a counter has grown in the time shown."""
    return f"increase({series(name)}[$__range])"


def by(label: str, expression: str) -> str:
    """The sum for each value of a label."""
    return f"sum by ({label}) ({expression})"


def quantiles(histogram: str) -> tuple[tuple[str, str], ...]:
    """The median, and what one in ten and one in a hundred exceeds."""
    buckets = by("le", rate(f"{histogram}_bucket"))
    return tuple((f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99))


def share(phases: str) -> str:
    """The share of the ranks' time that these phases take, by stage."""
    of_these, of_all = rate("rank_seconds_total", f'phase=~"{phases}"'), rate("rank_seconds_total")
    return f"{by('stage', of_these)} / {by('stage', of_all)}"


def spread(expression: str) -> str:
    """The slowest rank of each stage beside its fastest."""
    return f"max by (stage) ({expression}) / min by (stage) ({expression})"


_COMPUTE = rate("rank_seconds_total", 'phase="compute"')
_GENERATION = 'route=~"/v1/(chat/)?completions"'
_RECOVERIES = by("phase", increase("recovery_seconds_count"))
_RECOVERY_MEAN = f"{by('phase', increase('recovery_seconds_sum'))} / ({_RECOVERIES} > 0)"
_PHASES = f"{by('phase', rate('rank_seconds_total'))} / scalar(sum({rate('rank_seconds_total')}))"
_HITS = f"sum({rate('prefix_cache_hits_total')}) / sum({rate('prefix_cache_queries_total')})"

ROWS: dict[str, tuple[Panel, ...]] = {
    "Traffic": (
        Panel("Sequences", "Computed now, and waiting for a lane or for blocks", "short",
              ((f"sum({series('requests_running')})", "running"), (f"sum({series('requests_waiting')})", "waiting"))),
        Panel("Answers by status", "Of completions and chats; 499: the client left", "reqps",
              ((by("status", rate("http_requests_total", _GENERATION)), "{{status}}"),), is_stacked=True),
        Panel("Sequences ended, by reason", "", "reqps",
              ((by("finished_reason", rate("requests_finished_total")), "{{finished_reason}}"),), is_stacked=True),
    ),
    "Latency": (
        Panel("Time to first token", "From a request to its first token", "s",
              quantiles("time_to_first_token_seconds")),
        Panel("Between tokens", "From one token to the next", "s", quantiles("inter_token_latency_seconds")),
        Panel("Whole answers", "From a request to the end of its answer", "s",
              quantiles("e2e_request_latency_seconds")),
        Panel("Time per token of an answer", "Mean of each answer, the first token left out", "s",
              quantiles("request_time_per_output_token_seconds")),
        Panel("Queued", "From a request to its first step", "s", quantiles("request_queue_time_seconds")),
        Panel("Decoding", "From an answer's first token to its end", "s", quantiles("request_decode_time_seconds")),
    ),
    "Tokens": (
        Panel("Throughput", "Tokens generated, and tokens of prompts", "short",
              ((f"sum({rate('generation_tokens_total')})", "generated"),
               (f"sum({rate('prompt_tokens_total')})", "of prompts"))),
        Panel("Prompt lengths", "Tokens", "short", quantiles("request_prompt_tokens")),
        Panel("Answer lengths", "Tokens", "short", quantiles("request_generation_tokens")),
        Panel("Tokens a step", "Those of prompts included; more fill the device better", "short",
              ((f"sum({rate('step_tokens_sum')}) / sum({rate('step_tokens_count')})", "mean"),)),
        Panel("Steps", "A second, of all lanes", "short", ((by("replica", rate("steps_total")), "{{replica}}"),)),
        Panel("Generated, by API key", "Nothing where the server asks for no keys", "short",
              ((by("key", rate("key_generation_tokens_total")), "{{key}}"),), is_stacked=True),
    ),
    "KV cache": (
        Panel("Held", "Share of the blocks that live sequences hold", "percentunit",
              ((series("kv_usage_ratio"), "{{replica}}"),)),
        Panel("Prompts found in the prefix cache", "Share of their tokens", "percentunit", ((_HITS, "found"),)),
        Panel("Preemptions", "Sequences that gave their blocks to an older one; many: too small a cache", "short",
              ((by("replica", rate("preemptions_total")), "{{replica}}"),)),
    ),
    "Pipeline": (
        Panel("Bubble, by stage", "Share of a stage's time without anything to compute. High in all stages: too little "
              "load. High in one: layers are dealt unevenly", "percentunit",
              ((share("|".join(BUBBLE)), "stage {{stage}}"),)),
        Panel("Exchange, by stage", "Share of a stage's time in all-reduces and gathers, waiting for slower shards "
              "included", "percentunit", ((share("exchange"), "stage {{stage}}"),)),
        Panel("Where the ranks' time goes", "All ranks together", "percentunit",
              ((_PHASES, "{{phase}}"),), is_stacked=True),
        Panel("Slowest rank", "The rank that computes for the largest share of its time: the others wait for it",
              "percentunit",
              ((f"topk(1, sum by (replica, rank, stage, shard) ({_COMPUTE}))",
                "{{replica}} rank {{rank}} (stage {{stage}}, shard {{shard}})"),)),
        Panel("Slowest to fastest rank, by stage", "Time that shards of a stage compute; 1: all alike", "short",
              ((spread(f"sum by (replica, rank, stage) ({_COMPUTE})"), "stage {{stage}}"),)),
        Panel("Graphs", "Shapes of steps that are captured, and that can be; none on CPU", "short",
              ((f"sum({series('graph_shapes_captured')})", "captured"), (f"sum({series('graph_shapes')})", "all"))),
    ),
    "Recovery": (
        Panel("Epochs lost", "In the time shown, by cause", "short",
              ((by("cause", increase("gang_rebuilds_total")), "{{cause}}"),), kind="bargauge"),
        Panel("Coming back, by phase", "Mean seconds of the recoveries in the time shown", "s",
              ((_RECOVERY_MEAN, "{{phase}}"),), kind="bargauge"),
        Panel("Tokens replayed", "Computed again after a rank was lost", "short",
              ((f"sum({rate('tokens_replayed_total')})", "tokens"),)),
        Panel("Epoch", "Goes up by one when a rank is lost", "short", ((series("engine_epoch"), "{{replica}}"),)),
        Panel("Spares", "Processes that wait to take a rank over, by stage", "short",
              ((by("stage", series("spare_ranks")), "stage {{stage}}"),)),
        Panel("Time since the last step", "While sequences run or wait; more than a step takes: nothing goes on", "s",
              ((series("step_age_seconds"), "{{replica}}"),)),
    ),
    "Health": (
        Panel("Replicas, by state", "", "short",
              ((by("state", series("engine_state")), "{{state}}"),), is_stacked=True),
        Panel("Ranks heard last", "Seconds since the rank that was silent for longest was heard", "s",
              ((f"max by (replica) ({series('rank_heartbeat_age_seconds')})", "{{replica}}"),)),
        Panel("Ranks, by node", "", "short", ((by("node", series("rank_info")), "{{node}}"),), is_stacked=True),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The whole board, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_row(title, len(panels) + 1, top))
        for place, panel in enumerate(row):
            x, y = place % _IN_A_ROW * _WIDTH, top + 1 + place // _IN_A_ROW * _HEIGHT
            panels.append(_panel(panel, len(panels) + 1, x, y))
        top += 1 + -(-len(row) // _IN_A_ROW) * _HEIGHT
    return {
        "uid": "stagemesh",
        "title": "stagemesh",
        "tags": ["stagemesh", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), *map(_variable, VARIABLES)]},
        "panels": panels,
    }


def _source() -> dict[str, Any]:
    return {"name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(name: str) -> dict[str, Any]:
    query = f"label_values(stagemesh_build_info, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",  # also where nothing has the label, as `namespace` outside of Kubernetes
        "current": {"text": "All", "value": "$__all"},
    }


def _row(title: str, number: int, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": 24, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    is_instant = panel.kind == "bargauge"
    targets = [
        {
            "refId": chr(ord("A") + place),
            "datasource": SOURCE,
            "expr": expression,
            "legendFormat": legend,
            "instant": is_instant,
            "range": not is_instant,
        }
        for place, (expression, legend) in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.is_stacked else "none"}
        defaults["custom"] = {"fillOpacity": 30 if panel.is_stacked else 8, "showPoints": "never", "stacking": stacking}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.words,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def text() -> str:
    """What stands in the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
