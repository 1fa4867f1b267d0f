"""One replica: the HTTP app over a gang that is hosted in its process."""

import logging
import sys

from ray import serve
from ray.util.placement_group import PlacementGroup

from configs.config import Config
from deployments.hosting import GangHost


class Replica:
    """HTTP app, engine and gang in one process. The constructor returns when the gang serves."""

    def __init__(self, config: Config, device: str, placement: PlacementGroup) -> None:
        """`device` is cpu or cuda. Raises an error that says what is wrong with the model or the gang."""
        _log_to_stdout()
        self._host = GangHost(config, device, placement, serve.get_replica_context().replica_id.unique_id)
        from deployments.api.routes import build_app  # with Transformers, which the host has imported meanwhile

        self.app = build_app(self._host.service)

    def check_health(self) -> None:
        """Raises RuntimeError when the gang cannot come back."""
        self._host.check_health()

    def close(self) -> None:
        """End requests, engine and gang. May be called twice."""
        self._host.close()


def _log_to_stdout() -> None:
    """Show our progress lines to whoever started the server; Serve's own lines go into its files."""
    handler = logging.StreamHandler(sys.__stdout__)  # Serve sends sys.stdout into its file
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for package in ("cluster", "actors", "deployments"):
        logging.getLogger(package).addHandler(handler)
        logging.getLogger(package).setLevel(logging.INFO)
