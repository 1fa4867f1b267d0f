"""One replica: reads the model, starts its gang and its engine, and wires them to the HTTP app."""

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

from ray import serve
from ray.util.placement_group import PlacementGroup

from actors.decisions.plan import Plan, make_plan
from actors.decisions.scheduler import SchedulerSettings
from actors.remote.engine import Engine
from actors.remote.gang import Gang
from actors.remote.meeting import RankInfo
from actors.words.executor import Executor
from cluster.topology import Topology
from configs.config import Config
from deployments.outbox import Outbox

logger = logging.getLogger(__name__)


class Replica:
    """HTTP app, engine and gang in one process. The constructor returns when the gang serves."""

    def __init__(self, config: Config, device: str, placement: PlacementGroup) -> None:
        """`device` is cpu or cuda. Raises what is wrong with the model or the gang, in words for people."""
        _log_to_stdout()
        parallel = config.parallel
        topology = Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        self._make_gang = partial(Gang, config, topology, placement, device)
        self._gang = self._make_gang(epoch=0)
        try:
            self._plan, app_of = _read_model(config)  # while the ranks' processes start
            self._gang.start(self._plan)
        except BaseException:
            self._gang.close()
            raise
        self._num_blocks = self._gang.num_blocks  # of every later epoch too: the scheduler counts on it
        settings = SchedulerSettings(
            num_blocks=self._num_blocks,
            block_size=self._plan.block_size,
            max_num_seqs=self._plan.max_num_seqs,
            max_num_batched_tokens=self._plan.max_num_batched_tokens,
            num_lanes=self._plan.num_lanes,
            depth=self._plan.depth,
            prefix_cache=self._plan.prefix_cache,
        )
        outbox = Outbox()
        self._engine = Engine(self._gang.executor, settings, outbox.deliver, self._revive)
        self.app = app_of(self._engine, outbox, self._ranks)
        self._engine.start()
        logger.info("serving %s on %d ranks", config.served_name, topology.num_ranks)

    def check_health(self) -> None:
        """Raises RuntimeError when the gang cannot come back."""
        if self._engine.snapshot().state == "failed":
            raise RuntimeError(f"the gang is lost: {self._engine.failure}")

    def _ranks(self) -> list[RankInfo]:
        return self._gang.ranks()  # of the present epoch

    def _revive(self, epoch: int) -> Executor:
        """A gang of a new epoch in the same bundles, with a cache of the same size. Called in the engine's thread."""
        self._gang.close(patience_s=0)  # survivors may wait inside a collective for whoever is gone
        self._gang = self._make_gang(epoch=epoch)
        self._gang.start(self._plan, self._num_blocks)
        return self._gang.executor

    def close(self) -> None:
        """End requests, engine and gang. May be called twice."""
        self._engine.close()
        self._gang.close()


def _read_model(config: Config) -> tuple[Plan, Any]:
    """The plan, and what makes the HTTP app once the engine is there. Imports torch and transformers."""
    from actors.tensors.source import resolve_source
    from actors.tensors.spec_reader import read_spec
    from deployments.http import build_app
    from deployments.service import Identity, Limits, Service
    from deployments.text import Text

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
