"""Captures steps in CUDA graphs: one launch a step, the all-reduces included, one memory pool for all graphs.

Each graph is checked when it is made: on every shard it must give what the same step gives without it, or all shards go
on without.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch

from actors.tensors.backends.cuda.static_step import StaticStep
from cluster.collectives.interface import NeighborLost, StageGroup, all_agree


class Graph(Protocol):
    """A piece of work that can be repeated over the same buffers by one launch."""

    def capture(self, work: Callable[[], object]) -> None:
        """Record the work, without running it. Raises RuntimeError where it cannot be repeated."""

    def replay(self) -> None:
        """Run it again on the current stream."""

    def reset(self) -> None:
        """Give up what was recorded, a half-made record too. May be called twice."""


class CUDAGraphs:
    """Makes the graphs of a rank, which share a memory pool and the stream that they are captured on."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self) -> Graph:
        """An empty graph."""
        return _CUDAGraph(self)

    def rehearse(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run on the capturing stream, after what was launched before, and before what is launched later → a copy."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work().clone()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def leave_pool(self) -> None:
        """Take another pool after a capture that failed: torch goes on recording into the old one.

        Where the end of a capture fails, torch.cuda.graph returns before it leaves its stream and its pool.
        """
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, self.pool)  # noqa: SLF001
            torch._C._cuda_releasePool(device, self.pool)  # noqa: SLF001
        self.pool = torch.cuda.graph_pool_handle()


class _CUDAGraph:
    """See Graph."""

    def __init__(self, graphs: CUDAGraphs) -> None:
        self._graphs = graphs
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], object]) -> None:
        """See Graph."""
        current, graphs = torch.cuda.current_stream(), self._graphs
        try:
            # Other threads of this process (heartbeats, NCCL's watchdog) may call CUDA meanwhile
            with torch.cuda.graph(
                self._graph, pool=graphs.pool, stream=graphs.stream, capture_error_mode="thread_local"
            ):
                work()
        except BaseException:
            torch.cuda.set_stream(current)
            graphs.leave_pool()
            raise

    def replay(self) -> None:
        """See Graph."""
        self._graph.replay()

    def reset(self) -> None:
        """See Graph."""
        self._graph.reset()


class GraphMaker(Protocol):
    """Makes graphs of one device; see CUDAGraphs."""

    def __call__(self) -> Graph:
        """An empty graph."""

    def rehearse(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a piece of work as it will be captured → a copy of its result."""


class CapturedStep:
    """A StaticStep in a graph."""

    def __init__(self, graph: Graph, result: torch.Tensor) -> None:
        """`result`: where the step leaves its result."""
        self._graph, self._result = graph, result

    def run(self) -> torch.Tensor:
        """Replay the graph on the current stream → see StaticStep.run."""
        self._graph.replay()
        return self._result

    def release(self) -> None:
        """Give up the graph, and the group that it holds."""
        self._graph.reset()


def capture(step: StaticStep, make_graph: GraphMaker, group: StageGroup) -> CapturedStep | str:
    """Capture a step whose buffers hold padding only; all shards call it at the same time → why not, on all of them.

    Nothing of a graph that is not used stays, whatever happens: it would hold the group, which then cannot be aborted.
    """
    graph = make_graph()
    results: list[torch.Tensor] = []

    def make() -> None:
        graph.capture(lambda: results.append(step.run()))

    def check() -> None:
        graph.replay()
        torch.testing.assert_close(results[0].float(), expected.float(), rtol=0.02, atol=0.02)

    try:
        expected = make_graph.rehearse(step.run)  # plans, workspaces and compiling happen here, before the capture
        # A vote before the replay: the all-reduces in it need every shard
        for work in (make, check):
            reason_not = _attempt(work)
            if not all_agree(group, reason_not is None, expected.device):
                graph.reset()
                return reason_not or "another shard could not"
    except BaseException:
        graph.reset()
        raise
    return CapturedStep(graph, results[0])


def _attempt(work: Callable[[], None]) -> str | None:
    """Do it → None, or why it failed."""
    try:
        work()
    except NeighborLost:
        raise
    except (RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None
