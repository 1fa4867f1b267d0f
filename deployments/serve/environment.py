"""The environment of Ray that serving wants: `make serve` sets it; nodes of a cluster need it before `ray start`."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """What a variable of the environment is set to, and what it costs to leave it out."""

    value: str
    cost: str


VARIABLES = {  # `make serve` sets them as defaults only: what the user has set wins
    "RAY_USAGE_STATS_ENABLED": Variable("0", "Ray reports usage to its makers"),
    "RAY_DEDUP_LOGS": Variable("0", "equal lines of different ranks are shown once"),
    "RAY_SERVE_LOG_TO_STDERR": Variable("0", "Serve's own log stands between the ranks' lines"),
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": Variable(
        "0.5", "Serve's controller looks ten times a second, which took 5 % of the tokens/s on two cores"
    ),
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": Variable("2", "a dead proxy starts again after 33 s, not within seconds"),
    "RAY_worker_niceness": Variable(
        "0", "whatever else runs on a node goes before a rank, and all ranks wait for that one"
    ),
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": Variable(
        "0", "each token changes threads on its way out, at twice the CPU time"
    ),
    "RAY_SERVE_ENABLE_HA_PROXY": Variable(
        "1", "Serve's own proxy takes more CPU for each token, and loses the body of requests with `Upgrade: h2c`"
    ),
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": Variable(
        "3600", "each replica that comes or goes ends the streams that began more than 120 s before"
    ),
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": Variable("65536", "headers of more than 15 KB get a 400 without a reason"),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": Variable("1", "behind HAProxy a replica takes 30 s to stop"),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": Variable(
        "deployments.edge:middlewares", "any client can command Serve by headers"
    ),
}
ENVIRONMENT = {name: variable.value for name, variable in VARIABLES.items()}


def lacking(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment leaves unset → what each costs, in words. Other values than ours were somebody's choice."""
    return {name: variable.cost for name, variable in VARIABLES.items() if name not in environment}
