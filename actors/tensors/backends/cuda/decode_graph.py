"""Decode steps captured in CUDA graphs: one launch a step, the all-reduces included, one memory pool for all graphs.

Each graph is checked at start-up: on every shard it must give what the same step gives uncaptured, or all shards run
without graphs.
"""

import functools
import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from actors.decisions.schedule.buckets import Bucket
from actors.tensors.backend import DecodeRows
from actors.tensors.backends.cuda.decode_step import DecodeStep
from cluster.collectives.interface import StageGroup, all_agree

logger = logging.getLogger(__name__)

_CUDA = torch.device("cuda")

Result = TypeVar("Result")


class Runnable(Protocol):
    """A decode step of one bucket, captured or not; see DecodeStep."""

    def fill(self, rows: DecodeRows) -> None:
        """Copy a step's inputs into the buffers."""

    def table_rows(self, num_rows: int) -> torch.Tensor:
        """The sequence table's rows of the first `num_rows` rows, int64 on the device."""

    def run(self) -> torch.Tensor:
        """Hidden states or logits [B, *]."""


class CapturedStep:
    """A DecodeStep as a CUDA graph. The next `run` overwrites what `run` returned."""

    def __init__(self, step: DecodeStep, pool: object, stream: torch.cuda.Stream) -> None:
        self.fill, self.table_rows = step.fill, step.table_rows
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of this process (heartbeats, NCCL's watchdog) may call CUDA meanwhile
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            self._output = step.run()

    def run(self) -> torch.Tensor:
        """Replay the graph on the current stream."""
        self._graph.replay()
        return self._output


def capture(steps: dict[Bucket, DecodeStep], group: StageGroup) -> dict[Bucket, CapturedStep]:
    """Capture steps, whose buffers hold padding only, in the order given; all shards call it at the same time.

    Returns a captured step for each bucket, or none at all if any shard failed, which then logs the reason.
    """
    captured: dict[Bucket, CapturedStep] = {}
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for number, (bucket, step) in enumerate(steps.items(), 1):
        expected = _on(stream, step.run)  # plans, workspaces and autotuning happen here, before the capture
        # A vote before the replay: the all-reduces in it need every shard
        made = _attempt(bucket, functools.partial(CapturedStep, step, pool, stream))
        if not all_agree(group, made is not None, _CUDA):
            return {}
        assert made is not None
        if not all_agree(group, bool(_attempt(bucket, functools.partial(_check, made.run(), expected))), _CUDA):
            return {}
        captured[bucket] = made
        logger.info(
            "captured decode graph %d of %d: %d rows of %d blocks",
            number, len(steps), bucket.num_rows, bucket.num_blocks,
        )  # fmt: skip
    return captured


def _on(stream: torch.cuda.Stream, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run on another stream, after what was launched before, and before what is launched later."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work().clone()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def _check(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Raises AssertionError where a replay differs from the step that was captured."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)
    return True


def _attempt(bucket: Bucket, work: Callable[[], Result]) -> Result | None:
    try:
        return work()
    except (RuntimeError, AssertionError) as error:
        logger.warning("decode runs without CUDA graphs: %s: %s", bucket, error)
        return None
