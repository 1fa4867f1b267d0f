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
        """`device` is cpu or cuda. Raises an error that says what is wrong with the model or the gang."""
        _log_to_stdout()
        parallel = config.parallel
        topology = Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        self._gang = Gang(config, topology, placement, device)
        try:
            with collector_paused():
                plan, app_of = _read_model(config, device)  # while the ranks' processes start
            self._gang.start(plan)
            max_model_len = _longest(plan, self._gang.num_blocks)
        except BaseException:
            self._gang.close()
            raise
        outbox = Outbox()
        gang = self._gang
        self._engine = Engine(gang.executor, plan.scheduler, gang.num_blocks, outbox.deliver, gang.revive)
        self.app = app_of(self._engine, outbox, self._gang.ranks, max_model_len)
        calm_collector()
        self._engine.start()
        logger.info("serving %s; ranks: %d", config.served_name, topology.num_ranks)

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
    """Let the garbage collector skip what exists now, and run more rarely: each run delays a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _read_model(config: Config, device: str) -> tuple[Plan, Any]:
    """The plan, and a function that makes the HTTP app once the engine exists. Imports torch and Transformers."""
    from actors.tensors.backends.choose import default_block_size
    from actors.tensors.model.spec_reader import read_spec
    from actors.tensors.weights.source import resolve_source
    from deployments.api.routes import build_app
    from deployments.api.sampling_defaults import SamplingDefaults
    from deployments.api.service import Identity, Limits, Service
    from deployments.text.tokenizer import Text

    folder = resolve_source(config.model.source, config.model.revision)
    spec, block_size = read_spec(folder, config.model.dtype), default_block_size(config.device, device)
    plan = make_plan(config, spec, block_size)
    text, defaults = Text.load(folder), SamplingDefaults.read(folder, config.model.generation_config)
    logger.info("sampling defaults of generation_config.json: %s", defaults)

    def app_of(engine: Engine, outbox: Outbox, ranks: Callable[[], list[RankInfo]], max_model_len: int) -> Any:
        identity = Identity(
            model=config.served_name,
            replica=serve.get_replica_context().replica_id.unique_id,
            version=version("stagemesh"),
            created=int(time.time()),
            topology=plan.topology,
        )
        limits = Limits(
            max_model_len=max_model_len,
            vocab_size=plan.spec.vocab_size,
            admission=config.admission,
            request_s=config.timeouts.request_s,
        )
        return build_app(Service(engine, outbox, text, identity, limits, ranks, defaults))

    return plan, app_of


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


def _log_to_stdout() -> None:
    """Show our progress lines to whoever started the server; Serve's own lines go into its files."""
    handler = logging.StreamHandler(sys.__stdout__)  # Serve sends sys.stdout into its file
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for package in ("cluster", "actors", "deployments"):
        logging.getLogger(package).addHandler(handler)
        logging.getLogger(package).setLevel(logging.INFO)
