"""One replica: reads the model, starts its gang and its engine, and wires them to the HTTP app."""

import gc
import logging
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ray import serve
from ray.util.placement_group import PlacementGroup

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.schedule.scheduler import SchedulerSettings
from actors.remote.engine import Engine
from actors.remote.gang import Gang
from actors.remote.imports import collector_paused
from actors.remote.meeting import RankInfo
from cluster.topology import Topology
from configs.config import Config
from deployments.api.outbox import Outbox

logger = logging.getLogger(__name__)


class Replica:
    """HTTP app, engine and gang in one process. The constructor returns when the gang serves."""

    def __init__(self, config: Config, device: str, placement: PlacementGroup) -> None:
        """`device` is cpu or cuda. Raises what is wrong with the model or the gang, in words for people."""
        _log_to_stdout()
        parallel = config.parallel
        topology = Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        self._gang = Gang(config, topology, placement, device)
        try:
            with collector_paused():
                plan, app_of = _read_model(config)  # while the ranks' processes start
            self._gang.start(plan)
        except BaseException:
            self._gang.close()
            raise
        settings = settings_of(plan, self._gang.num_blocks)
        outbox = Outbox()
        self._engine = Engine(self._gang.executor, settings, outbox.deliver, self._gang.revive)
        self.app = app_of(self._engine, outbox, self._gang.ranks)
        calm_collector()
        self._engine.start()
        logger.info("serving %s on %d ranks", config.served_name, topology.num_ranks)

    def check_health(self) -> None:
        """Raises RuntimeError when the gang cannot come back."""
        if self._engine.snapshot().state == "failed":
            raise RuntimeError(f"the gang is lost: {self._engine.failure}")

    def close(self) -> None:
        """End requests, engine and gang. May be called twice."""
        self._gang.give_up()
        self._engine.close()
        self._gang.close()
        self.app.state.service.text.close()


def calm_collector() -> None:
    """Keep the garbage collector from what stays, and from looking after every few steps: each look holds up a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def settings_of(plan: Plan, num_blocks: int) -> SchedulerSettings:
    """The limits of a gang: the plan's, and the cache that its ranks have."""
    return SchedulerSettings(
        num_blocks=num_blocks,
        block_size=plan.block_size,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        num_lanes=plan.num_lanes,
        depth=plan.depth,
        prefix_cache=plan.prefix_cache,
    )


def _read_model(config: Config) -> tuple[Plan, Any]:
    """The plan, and what makes the HTTP app once the engine is there. Imports torch and transformers."""
    from actors.tensors.model.spec_reader import read_spec
    from actors.tensors.weights.source import resolve_source
    from deployments.api.routes import build_app
    from deployments.api.service import Identity, Limits, Service
    from deployments.text.tokenizer import Text

    folder = resolve_source(config.model.source, config.model.revision)
    plan = make_plan(config, read_spec(folder, config.model.dtype))
    text = Text.load(folder)

    def app_of(engine: Engine, outbox: Outbox, ranks: Callable[[], list[RankInfo]]) -> Any:
        identity = Identity(
            model=config.served_name,
            replica=serve.get_replica_context().replica_id.unique_id,
            version=version("stagemesh"),
            created=int(time.time()),
            topology=plan.topology,
        )
        limits = Limits(
            max_model_len=plan.max_model_len,
            vocab_size=plan.spec.vocab_size,
            max_requests=config.admission.max_requests,
            max_body_bytes=config.admission.max_body_bytes,
            request_s=config.timeouts.request_s,
        )
        return build_app(Service(engine, outbox, text, identity, limits, ranks))

    return plan, app_of


def _log_to_stdout() -> None:
    """Our own progress lines reach whoever started the server; Serve's logger has its own files."""
    handler = logging.StreamHandler(sys.__stdout__)  # Serve sends sys.stdout into its file
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for room in ("cluster", "actors", "deployments"):
        logging.getLogger(room).addHandler(handler)
        logging.getLogger(room).setLevel(logging.INFO)
