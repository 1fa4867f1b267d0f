"""The Ray cluster that tests of this folder share which ask Ray itself; those of `make serve` start their own."""

from collections.abc import Callable, Iterator

import pytest

ray = pytest.importorskip("ray")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One node of two CPUs, connected to; commands that look for Ray join it."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        labels={"zone": "north"},
    )
    yield
    ray.shutdown()


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints past pytest's capture."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)

    return say
