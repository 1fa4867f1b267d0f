"""A gang with its engine behind a Service, in one process: what a replica hosts, and a batch job without HTTP."""

import gc
import logging
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ray.util.placement_group import PlacementGroup

from actors.decisions.model.plan import Plan, make_plan
from actors.remote.engine import Engine
from actors.remote.gang import Gang
from actors.remote.imports import collector_paused
from cluster.topology import Topology
from configs.config import Config
from deployments.api.outbox import Outbox

if TYPE_CHECKING:  # it imports Transformers, which is to happen while the ranks' processes start
    from deployments.api.service import Service

logger = logging.getLogger(__name__)

_ServiceOf = Callable[[Engine, Outbox, Gang, int], "Service"]


class GangHost:
    """Gang, engine and service. The constructor returns when the gang serves; it takes minutes for large models."""

    def __init__(
        self, config: Config, device: str, placement: PlacementGroup, name: str, now: datetime | None = None
    ) -> None:
        """`device` is cpu or cuda; `name` is what `/cluster` calls this replica.

        `now`: the time that chat templates are told; none: that of each conversation.

        Raises an error that says what is wrong with the model or the gang.
        """
        parallel = config.parallel
        topology = Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        self._gang = gang = Gang(config, topology, placement, device)
        try:
            with collector_paused():
                plan, service_of = _read_model(config, device, name, now)  # while the ranks' processes start
            gang.start(plan)
            max_model_len = _longest(plan, gang.num_blocks)
        except BaseException:
            gang.close()
            raise
        outbox = Outbox()
        self._engine = Engine(gang.executor, plan.scheduler, gang.num_blocks, outbox.deliver, gang.revive)
        self.plan, self.num_blocks = plan, gang.num_blocks
        self.service = service_of(self._engine, outbox, gang, max_model_len)
        calm_collector()
        self._engine.start()
        logger.info("serving %s; ranks: %d", config.served_name, topology.num_ranks)

    def check_health(self) -> None:
        """Raises RuntimeError when the gang cannot come back."""
        if self._engine.state == "failed":
            raise RuntimeError(f"the gang is lost: {self._engine.failure}")

    def close(self) -> None:
        """End requests, engine and gang. May be called twice."""
        self._gang.give_up()
        self._engine.close()
        self._gang.close()
        self.service.text.close()


def calm_collector() -> None:
    """Let the garbage collector skip what exists now, and run more rarely: each run delays a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _read_model(config: Config, device: str, name: str, now: datetime | None) -> tuple[Plan, _ServiceOf]:
    """The plan, and a function that makes the service once the engine exists. Imports torch and Transformers."""
    from actors.tensors.backends.choose import default_block_size
    from actors.tensors.model.spec_reader import read_spec
    from actors.tensors.weights.source import resolve_source
    from deployments.api.sampling_defaults import SamplingDefaults
    from deployments.api.service import Identity, Limits, Service
    from deployments.text.tokenizer import Text

    folder = resolve_source(config.model)
    spec, block_size = read_spec(folder, config.model.dtype), default_block_size(config.device, device)
    plan = make_plan(config, spec, block_size)
    text, defaults = (
        Text.load(folder, config.model.tool_format, now),
        SamplingDefaults.read(folder, config.model.generation_config),
    )
    logger.info("sampling defaults of generation_config.json: %s", defaults)

    def service_of(engine: Engine, outbox: Outbox, gang: Gang, max_model_len: int) -> Service:
        identity = Identity(
            model=config.served_name,
            replica=name,
            version=_version(),
            created=int(time.time()),
            topology=plan.topology,
        )
        limits = Limits(
            max_model_len=max_model_len,
            vocab_size=plan.spec.vocab_size,
            admission=config.admission,
            unknown_fields=config.api.unknown_fields,
            request_s=config.timeouts.request_s,
        )
        return Service(
            engine, outbox, text, identity, limits, gang.ranks, defaults, config.monitoring, num_spares=gang.num_spares
        )

    return plan, service_of


def _version() -> str:
    try:
        return version("stagemesh")
    except PackageNotFoundError:  # a checkout that was not installed, on PYTHONPATH
        return "unknown"


def _longest(plan: Plan, num_blocks: int) -> int:
    """Tokens of the longest request with a KV cache of `num_blocks`."""
    longest = plan.fitted(num_blocks).max_model_len
    if longest < plan.max_model_len:
        logger.warning(
            "model.max_model_len: %d tokens, which the KV cache holds, of the model's %d; set it to ask for a length",
            longest,
            plan.max_model_len,
        )
    return longest
