"""The group of keys about what operators see: names of metrics, and the log of requests."""

from typing import Literal

from pydantic import Field

from configs.group import Group


class MonitoringConfig(Group):
    """What operators see of a replica."""

    metric_aliases: Literal["none", "vllm"] = Field(
        default="none",
        description="`vllm`: /metrics shows what vLLM counts too under vLLM's names (`vllm:num_requests_waiting` and "
        "so on). Set it for boards, autoscalers and gateways that ask for those.",
    )
    access_log: Literal["requests", "all", "none"] = Field(
        default="requests",
        description="A line of JSON in the replica's log for each request: `requests`, but for probes (/health, "
        "/ready, /metrics); `all`, with probes; `none`. Set `none` where a gateway writes one already.",
    )
