"""The groups of keys about what runs: how long is waited, what happens when a rank is lost, and batch jobs."""

from typing import Annotated, Literal

from pydantic import Field

from configs.group import Group
from configs.units import Seconds, Unit


class TimeoutConfig(Group):
    """Limits of patience."""

    start_s: Seconds = Field(
        default=900.0,
        gt=0,
        description="Each phase of a start: processes, groups, weights, warm-up. Raise it for large checkpoints.",
    )
    collective_s: Seconds = Field(
        default=60.0,
        gt=0,
        description="One exchange between shards, or one hop between stages; also the first step. "
        "Raise it where first steps take longer, for example while kernels are compiled.",
    )
    request_s: Seconds = Field(
        default=600.0,
        gt=0,
        description="One request from its arrival to its end; then it gets 504. Clients may ask for less (`timeout`). "
        "Raise it for long answers of slow models.",
    )
    drain_s: Seconds = Field(
        default=30.0,
        ge=0,
        description="What runs may take to finish when a replica stops, or a node of it is drained; then it is cut. "
        "Raise it to the length of your longest answers.",
    )


class RecoveryConfig(Group):
    """What happens when a rank is lost."""

    mode: Literal["rejoin", "restart_all"] = Field(
        default="rejoin",
        description="`rejoin`: the other ranks keep processes and weights; `restart_all`: all start again, which is "
        "also done when rejoining fails. Set `restart_all` where survivors are not trusted.",
    )
    warm_spares: Annotated[int, Unit("processes")] = Field(
        default=0,
        ge=0,
        le=8,
        description="Processes of each stage that wait with everything imported, without weights. "
        "Set 1 so that a lost rank costs no start of a process; each takes the memory of its imports.",
    )
    clean_s: Seconds = Field(
        default=3.0,
        gt=0,
        description="For survivors to leave the lost epoch; then they are ended too. Raise it where they are slow.",
    )
    wait_s: Seconds = Field(
        default=300.0,
        gt=0,
        description="How long recovery waits for processes in place of lost ones, and for a lost node to be back. "
        "Raise it where a new node takes longer to come.",
    )


class BatchConfig(Group):
    """What a batch job does otherwise than a server; servers leave it alone."""

    gangs: Annotated[int, Unit("gangs")] | None = Field(
        default=None,
        ge=1,
        description="Gangs that a job starts, each a copy of the model; none: as many as the cluster has room for. "
        "Set it to leave room for others.",
    )
    metrics_port: Annotated[int, Unit("port")] | None = Field(
        default=None,
        ge=1024,
        le=65_000,
        description="Where the first gang answers /metrics, on its node's address; the next gang one port above. "
        "Set it to have Prometheus watch a job.",
    )
