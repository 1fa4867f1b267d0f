"""One replica: the HTTP app over a gang that is hosted in its process."""

import logging
import os
import sys
from collections.abc import Mapping

from ray import serve
from ray.util.placement_group import PlacementGroup

from configs.config import Config
from deployments.api.key_ring import KeyRing
from deployments.api.request_log import ACCESS, RequestIdFilter
from deployments.hosting import GangHost
from deployments.serve.environment import ENVIRONMENT, lacking
from deployments.serve.peers import Peers

logger = logging.getLogger(__name__)


class Replica:
    """HTTP app, engine and gang in one process. The constructor returns when the gang serves."""

    def __init__(self, config: Config, device: str, placement: PlacementGroup) -> None:
        """`device` is cpu or cuda. Raises an error that says what is wrong with the model or the gang."""
        _log_to_stdout()
        say_what_is_lacking(os.environ)
        ring = (
            KeyRing(config.api.keys) if config.api.keys else None
        )  # what is wrong with it is said before a gang starts
        self._host = GangHost(config, device, placement, serve.get_replica_context().replica_id.unique_id)
        from deployments.api.routes import build_app  # with Transformers, which the host has imported meanwhile

        metrics_of_all = Peers("metrics_page", self.metrics_page).metrics
        self.app = build_app(self._host.service, ring, config.api.cors_origins, metrics_of_all)

    def check_health(self) -> None:
        """Raises RuntimeError when the gang cannot come back."""
        self._host.check_health()

    def metrics_page(self) -> bytes:
        """What /metrics/replica answers."""
        return self._host.service.metrics.page()

    def close(self) -> None:
        """End requests, engine and gang. May be called twice."""
        self._host.close()


def say_what_is_lacking(environment: Mapping[str, str]) -> None:
    """Log each variable that `make serve` would have set and this cluster lacks, with what that costs."""
    for name, cost in lacking(environment).items():
        logger.warning("this node lacks %s=%s in its environment before `ray start`: %s", name, ENVIRONMENT[name], cost)


def _log_to_stdout() -> None:
    """Show our progress lines to whoever started the server; Serve's own lines go into its files."""
    handler = logging.StreamHandler(sys.__stdout__)  # Serve sends sys.stdout into its file
    handler.setFormatter(logging.Formatter("%(asctime)s %(request)s%(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(RequestIdFilter())
    ACCESS.addHandler(logging.StreamHandler(sys.__stdout__))  # lines of JSON, and nothing else on them
    ACCESS.propagate = False
    for package in ("cluster", "actors", "deployments"):
        logging.getLogger(package).addHandler(handler)
        logging.getLogger(package).setLevel(logging.INFO)
