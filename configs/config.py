"""The frozen Config: every key a user may set, with its default, unit and bounds."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict


def is_backend_class(device: str) -> bool:
    """Whether `device` names a backend's class, as package.module:Class."""
    module, colon, name = device.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _device(asked: str) -> str:
    if asked in ("auto", "cpu", "cuda") or is_backend_class(asked):
        return asked
    raise ValueError("should be 'auto', 'cpu', 'cuda' or the class of a backend, package.module:Class")


class Group(BaseModel):
    """A group of keys: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Group):
    """Which checkpoint is served, and how its numbers are held."""

    source: str = Field(min_length=1)  # a folder (relative ones start at the project's root) or a hub id
    revision: str | None = None  # hub ids only: branch, tag or commit
    name: str | None = None  # the served id; None: the last part of source
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as config.json says
    max_model_len: int | None = Field(default=None, ge=2)  # prompt + generated tokens; None: the model's own


class ParallelConfig(Group):
    """How the model is cut."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    pipeline_parallel_size: int = Field(default=1, ge=1, le=1024)
    # The model's own plan, or rules with Transformers' patterns and styles: {"layers.*.mlp.up_proj": "colwise"}
    tp_plan: Literal["auto"] | dict[str, str] = "auto"
    tp_plan_mode: Literal["amend", "replace"] = "amend"  # what such rules do to the model's own
    allow_replication: bool = False  # let every shard hold large matrices whole that no rule cuts
    layers_per_stage: tuple[Annotated[int, Strict(), Field(ge=1)], ...] | None = Field(  # None: dealt by cost
        default=None,
        strict=False,  # YAML has lists, no tuples
    )


class CacheConfig(Group):
    """The paged KV cache of each rank."""

    block_size: int | None = Field(default=None, ge=1, le=1024)  # tokens in a block; None: what the device is best at
    num_blocks: int | None = Field(default=None, ge=1)  # None: as many as memory_share allows
    memory_share: float = Field(default=0.8, gt=0, lt=1)  # of the device memory that is free once loaded
    prefix_cache: bool = True  # keep blocks for requests that begin alike


class SchedulerConfig(Group):
    """How much runs at once."""

    max_num_seqs: int = Field(default=64, ge=1)  # sequences that hold blocks at the same time
    max_num_batched_tokens: int = Field(default=2048, ge=1)  # tokens of one step
    num_lanes: int | None = Field(default=None, ge=1)  # None: one a stage
    depth: int | None = Field(default=None, ge=1, le=4)  # steps in flight of one lane; None: 2


class AdmissionConfig(Group):
    """What is let in; more is answered 503, a larger body 413 before it costs anything."""

    max_requests: int = Field(default=256, ge=1)  # running and waiting together
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)  # a MiB of ids takes 20 ms to read, of the one event loop


class PlacementConfig(Group):
    """Where the stages go."""

    strategy: Literal["auto", "PACK", "STRICT_PACK", "STRICT_SPREAD"] = "auto"
    cpus_per_rank: float = Field(default=1.0, ge=0)
    cpus_per_replica: float = Field(default=1.0, ge=0)  # HTTP and engine, in bundle 0
    label_selector: dict[str, str] = Field(default_factory=dict)  # for every bundle, e.g. ray.io/accelerator-type
    wait_s: float = Field(default=0.0, ge=0)  # for nodes that an autoscaler brings


class TimeoutConfig(Group):
    """Limits of patience, in seconds."""

    start_s: float = Field(default=900.0, gt=0)  # from actors asked for to gang ready
    collective_s: float = Field(default=60.0, gt=0)  # one collective or one hop between stages
    request_s: float = Field(default=600.0, gt=0)  # one request, from its arrival to its end; clients may ask for less
    drain_s: float = Field(default=30.0, ge=0)  # for what runs when a replica has to stop, or a stage's node is drained


class RecoveryConfig(Group):
    """What happens when a rank is lost."""

    # rejoin: the others keep process and weights; restart_all: all start again, as they also do when rejoining fails
    mode: Literal["rejoin", "restart_all"] = "rejoin"
    warm_spares: int = Field(default=0, ge=0, le=8)  # processes of each stage that wait, without weights, to take over
    clean_s: float = Field(default=3.0, gt=0)  # a rank that has not left the lost epoch by then is ended
    wait_s: float = Field(default=300.0, gt=0)  # for processes in place of those lost, and for a lost node to be back


class Config(Group):
    """What was asked: the `args` of a Serve config file."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    # A backend of your own, `package.module:Class`, is imported by the ranks; see CONTRIBUTING.md
    device: Annotated[str, AfterValidator(_device)] = "auto"
    # auto: the device's kernels stand for the model's own modules where they compute the same; none: nowhere
    substitutions: Literal["auto", "none"] = "auto"
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    admission: AdmissionConfig = AdmissionConfig()
    placement: PlacementConfig = PlacementConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    recovery: RecoveryConfig = RecoveryConfig()

    @property
    def served_name(self) -> str:
        """The id that clients name: `model.name`, or the last part of the source."""
        return self.model.name or self.model.source.rstrip("/").rsplit("/", 1)[-1]
