"""The frozen Config: every key a user may set, with its default, unit and bounds.

docs/configuration.md is made of this; `python tests/docs_pages.py` writes it anew.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from configs.api import ApiConfig
from configs.group import Group
from configs.monitoring import MonitoringConfig
from configs.running import BatchConfig, RecoveryConfig, TimeoutConfig
from configs.units import Bytes, CPUs, Seconds, Sequences, Tokens, Unit


def is_backend_class(device: str) -> bool:
    """Whether `device` names a backend's class, as package.module:Class."""
    module, colon, name = device.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _device(asked: str) -> str:
    if asked in ("auto", "cpu", "cuda") or is_backend_class(asked):
        return asked
    raise ValueError("should be 'auto', 'cpu', 'cuda' or the class of a backend, package.module:Class")


class ModelConfig(Group):
    """Which checkpoint is served, and how its numbers are held."""

    source: str = Field(
        min_length=1,
        description="A folder, a hub id like `org/name`, or a URL like `s3://bucket/prefix` (docs/models.md). Relative "
        "folders start at the project's root. Always set.",
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub id, or version of a URL's files, which the log names; none: the "
        "hub's default branch, or what is there. Set it to a commit or version: every start loads the same weights.",
    )
    cache_folder: str | None = Field(
        default=None,
        min_length=1,
        description="Where a node keeps what it has fetched of a URL; none: `stagemesh` in the hub's folder "
        "(`HF_HOME`, else `~/.cache/huggingface`). Set it to the node's fastest disk with room.",
    )
    name: str | None = Field(
        default=None,
        description="What clients send as `model`; none: the last part of `source`. Set it for a name of your own.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of weights, activations and KV cache; `auto`: as config.json says, or the stored tensors. "
        "Set `bfloat16` for checkpoints in float32, or `float32` to compare results exactly.",
    )
    max_model_len: Tokens | None = Field(
        default=None,
        ge=2,
        description="Prompt and generated tokens of one request together; none: as many as the model knows and the KV "
        "cache holds. Set it so that a start without room for that long a request is refused.",
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="`auto`: requests that leave temperature, top_p and the like out get what the checkpoint's "
        "generation_config.json says; see docs/api.md. Set `none` for the API's own defaults, whatever the checkpoint.",
    )
    tool_format: str = Field(
        default="auto",
        description="How the model writes tool calls and thinking: a format of docs/api.md; `auto`: as the tokenizer "
        "or the chat template tells it; `none`: all that it writes is text. Set it where a fine-tune writes calls in "
        "another way than its template says.",
    )


class ParallelConfig(Group):
    """How the model is cut."""

    tensor_parallel_size: Annotated[int, Unit("shards")] = Field(
        default=1,
        ge=1,
        le=1024,
        description="Shards of every weight matrix; all shards of a stage are on one node. "
        "Raise it first, up to the GPUs of a node that are joined by fast links; it must divide heads and ffn columns.",
    )
    pipeline_parallel_size: Annotated[int, Unit("stages")] = Field(
        default=1,
        ge=1,
        le=1024,
        description="Stages of consecutive layers; each is on one node. "
        "Raise it where one node cannot hold the model, or its links are slow.",
    )
    tp_plan: Literal["auto"] | dict[str, str] = Field(
        default="auto",
        description="The model's own tensor-parallel plan, or rules of your own by Transformers' patterns and styles. "
        "Set rules to cut what the model's plan keeps whole, or the other way round; see docs/models.md.",
    )
    tp_plan_mode: Literal["amend", "replace"] = Field(
        default="amend",
        description="Whether rules in `tp_plan` are added to the model's own plan or stand in its place. "
        "Set `replace` where the model's own plan is not wanted at all.",
    )
    allow_replication: bool = Field(
        default=False,
        description="Let shards hold large matrices whole that no rule cuts. Set it when a start is refused for that.",
    )
    layers_per_stage: tuple[Annotated[int, Strict(), Field(ge=1)], ...] | None = Field(
        default=None,
        strict=False,  # YAML has lists, no tuples
        description="Layers of each stage, a list with one number a stage; none: dealt by cost, the head counted. "
        "Set it to fix the cut, for example where nodes differ.",
    )


class CacheConfig(Group):
    """The paged KV cache of each rank."""

    block_size: Tokens | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Tokens of one block; none: what the device is best at. "
        "Set it to share shorter prefixes (small blocks): only full blocks are shared.",
    )
    num_blocks: Annotated[int, Unit("blocks")] | None = Field(
        default=None,
        ge=1,
        description="Blocks of every rank; none: as many as `memory_share` allows on the fullest rank. "
        "Set it where the size must not depend on what else uses the memory, as in tests.",
    )
    memory_share: Annotated[float, Unit("share")] = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Share of the memory that is left beside the weights and the largest step, which a start measures; "
        "on CPU the ranks of a node divide 85 % of what is available. Lower it when ranks run out of memory, or where "
        "other programs use the device too.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep the blocks of ended requests for others that begin alike. "
        "Unset it to measure without reuse, or where a prompt's speed must not tell what others have sent.",
    )


class SchedulerConfig(Group):
    """How much runs at once."""

    max_num_seqs: Sequences = Field(
        default=64,
        ge=1,
        description="Sequences that hold KV blocks at the same time; more wait. "
        "Raise it for more tokens a second in all, lower it for sooner tokens of each.",
    )
    max_num_batched_tokens: Tokens = Field(
        default=2048,
        ge=1,
        description="Tokens of one step, prompts included; at least `max_num_seqs`. "
        "Raise it for faster prompts; activations take more memory, and steps more time.",
    )
    num_lanes: Annotated[int, Unit("lanes")] | None = Field(
        default=None,
        ge=1,
        description="Groups of sequences that take turns in the pipeline; none: one a stage. "
        "Set one more than stages where a stage still waits for the engine (`stagemesh profile` shows it).",
    )
    depth: Annotated[int, Unit("steps")] | None = Field(
        default=None,
        ge=1,
        le=4,
        description="Steps of one lane in flight; none: 2, which hides the way to the engine. Set 1 to debug.",
    )


_BODY_BYTES = 1024 * 1024
_BYTES_PER_TOKEN = 16  # an id in JSON has up to 8, and a token of text that is written in escapes 12


class AdmissionConfig(Group):
    """What is let in; what is above is refused before it costs anything."""

    max_requests: Sequences = Field(
        default=256,
        ge=1,
        description="Answers running and waiting together (`n` and lists of prompts count each); more get 503. "
        "Raise it for longer queues, lower it to let a load balancer go elsewhere sooner.",
    )
    max_waiting_tokens: Tokens | None = Field(
        default=None,
        ge=1,
        description="Prompt tokens of requests that have no token yet; more get 503, but for a request that finds "
        "nobody waiting. None: only their number counts. Set it where prompts differ much in length, to as many as "
        "are computed in the time that clients should wait.",
    )
    max_body_bytes: Bytes | None = Field(
        default=None,
        ge=1024,
        description="Size of one request's body; a larger one gets 413. None: 1 MiB, and 16 bytes for each token of "
        "the context. Set it where bodies are larger than their prompts, as with many tools; reading 1 MiB of token "
        "ids holds up other requests for 20 ms.",
    )

    def body_bytes(self, max_model_len: int) -> int:
        """The size that a body has at most, beside a context of so many tokens."""
        return self.max_body_bytes or _BODY_BYTES + max_model_len * _BYTES_PER_TOKEN


class PlacementConfig(Group):
    """Where the stages go."""

    strategy: Literal["auto", "PACK", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="auto",
        description="Ray's; `auto`: `STRICT_PACK` for one stage, else `PACK`. Set `STRICT_SPREAD`: a stage a node.",
    )
    cpus_per_rank: CPUs = Field(
        default=1.0,
        ge=0,
        description="CPUs that Ray reserves for each rank. Lower it where ranks may share cores, as in the demo.",
    )
    cpus_per_replica: CPUs = Field(
        default=1.0,
        ge=0,
        description="CPUs reserved for HTTP and engine, beside the first stage. Lower it on machines with few cores.",
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of every node used, as in `{ray.io/accelerator-type: H100}`. Set it where nodes differ.",
    )
    require_nvlink: bool = Field(
        default=False,
        description="Refuse a stage whose GPUs are not all joined by NVLink, before weights load; else a start warns, "
        "with the speed that it measures. Set it on machines with NVLink, so that no broken link goes unnoticed.",
    )
    wait_s: Seconds = Field(
        default=0.0,
        ge=0,
        description="How long a start waits for nodes that are missing or busy. "
        "Set it where an autoscaler brings nodes; with 0 what is short is said at once.",
    )


class NetworkConfig(Group):
    """How ranks on different nodes reach each other."""

    interface: str | None = Field(
        default=None,
        min_length=1,
        description="Network interface on which ranks and engine listen: a name, the beginning of one with `*`, or "
        "several with commas, of which the first that a node has is taken; none: the one with the address that Ray has "
        "for the node. Set it where nodes have several networks, as in `ens*,bond0`.",
    )


class Config(Group):
    """What was asked: the `args` of a Serve config file."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto",
        description="`cpu`, `cuda`, `auto` (CUDA where any node has a GPU), or a backend of your own as "
        "`package.module:Class`, which every node can import. Set it so that no start takes another device than meant.",
    )
    substitutions: Literal["auto", "none"] = Field(
        default="auto",
        description="`auto`: the device's kernels stand in for the model's own modules where they compute the same; "
        "`none`: nowhere, though attention over the KV cache, the choice of ids and exchanges stay the device's. Set "
        "`none` to find out whether a kernel is at fault; it is slower.",
    )
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    admission: AdmissionConfig = AdmissionConfig()
    api: ApiConfig = ApiConfig()
    placement: PlacementConfig = PlacementConfig()
    network: NetworkConfig = NetworkConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    batch: BatchConfig = BatchConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    @property
    def served_name(self) -> str:
        """The id that clients name: `model.name`, or the last part of the source."""
        return self.model.name or self.model.source.rstrip("/").rsplit("/", 1)[-1]
