"""`stagemesh doctor`: what is read from a node becomes a verdict and a remedy."""

import logging

import pytest

from deployments.serve.environment import ENVIRONMENT, lacking
from deployments.serve.replica import say_what_is_lacking


def test_the_replica_says_what_its_cluster_lacks_and_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    own = ENVIRONMENT | {"RAY_worker_niceness": "5"}  # another value is somebody's choice
    assert not lacking(own)
    del own["RAY_worker_niceness"]
    with caplog.at_level(logging.WARNING):
        say_what_is_lacking(own)
    (line,) = caplog.messages
    assert "RAY_worker_niceness=0" in line and "all ranks wait" in line
