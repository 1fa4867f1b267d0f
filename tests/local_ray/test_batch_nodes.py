"""A batch job whose gang loses its node: it waits until another node has room, and every row is answered once."""

from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from configs.files import parse_args  # noqa: E402
from deployments.api.bodies import CompletionBody  # noqa: E402
from deployments.api.responses import Stamp  # noqa: E402
from deployments.batch.answerer import GangAnswerer  # noqa: E402
from deployments.batch.progress import Progress  # noqa: E402
from deployments.batch.rows import Row, Tally  # noqa: E402

pytestmark = [pytest.mark.soak, pytest.mark.timeout(500)]

COUNT = 200


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that takes nothing, and the only node that takes a gang."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def rows() -> Iterator[Row]:
    for number in range(COUNT):
        fields = {"model": "demo", "prompt": f"{number}. A stage", "max_tokens": 40, "seed": number, "ignore_eos": True}
        yield Row(number, str(number), CompletionBody.model_validate(fields), Stamp(f"{number:032x}", 0), 100)


def test_a_lost_node_is_waited_for(cluster: Any) -> None:
    config = parse_args(
        {
            "model": {"source": "configs/demo", "dtype": "float32", "max_model_len": 512},
            "device": "cpu",
            "cache": {"num_blocks": 256},
            "placement": {"cpus_per_rank": 0.5, "cpus_per_replica": 0.5, "wait_s": 60.0},
        }
    )
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    answerer = GangAnswerer(config, datetime(2026, 1, 1, tzinfo=UTC), Progress(Tally(COUNT), StringIO()), int)
    found: dict[int, bytes] = {}
    for outcome in answerer.run(rows()):
        assert outcome.status == 200 and outcome.number not in found
        found[outcome.number] = outcome.body
        if len(found) == 30:
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
    assert sorted(found) == list(range(COUNT))
