"""Graphs without a GPU: a capture keeps the piece of work, a replay runs it again over the same buffers.

As with a GPU's graphs, a capture computes nothing, a replay reads what the buffers hold then, and a graph that was
given up cannot run. Buffers are poisoned where a step must not rely on what was in them.
"""

from collections.abc import Callable

import torch

from actors.tensors.backends.cuda.backend import CUDABackend

CPU = torch.device("cpu")
POISON = 1 << 28


class FakeGraph:
    def __init__(self, maker: "FakeGraphs") -> None:
        self.maker = maker
        self.work: Callable[[], object] | None = None
        self.num_replays = 0

    def capture(self, work: Callable[[], object]) -> None:
        self.work = work
        work()  # other shards may exchange in theirs
        self.maker.poison_result()
        if self.maker.failure is not None:
            raise self.maker.failure

    def replay(self) -> None:
        assert self.work is not None, "this graph was given up"
        self.maker.poison_result()
        self.work()
        self.num_replays += 1
        if self.num_replays > 1:  # the first one is the check, in the capture
            self.maker.poison_inputs()

    def reset(self) -> None:
        self.work = None


class FakeGraphs:
    """See GraphMaker. `failure`: what the next captures raise, half-made."""

    def __init__(self) -> None:
        self.made: list[FakeGraph] = []
        self.failure: BaseException | None = None
        self.inputs: torch.Tensor | None = None
        self.result: torch.Tensor | None = None

    def __call__(self) -> FakeGraph:
        self.made.append(FakeGraph(self))
        return self.made[-1]

    def rehearse(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.result = work()
        return self.result.clone()

    def poison_result(self) -> None:
        if self.result is not None:
            self.result.fill_(float("nan"))

    def poison_inputs(self) -> None:
        if self.inputs is not None:
            self.inputs.fill_(POISON)

    @property
    def num_kept(self) -> int:
        """Graphs that are not given up."""
        return sum(graph.work is not None for graph in self.made)


class LateDownload:
    """Here at the third look, as if it came from a device."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers, self.looks = numbers.clone(), 0

    def is_ready(self) -> bool:
        self.looks += 1
        return self.looks > 2

    def take(self) -> torch.Tensor:
        self.looks = 3
        return self.numbers


class FakeGraphBackend(CUDABackend):
    """The CUDA backend on CPU, with such graphs."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.makers: list[FakeGraphs] = []  # one a rank of this process

    def graph_maker(self) -> FakeGraphs:
        self.makers.append(FakeGraphs())
        return self.makers[-1]


class LateGraphBackend(FakeGraphBackend):
    """Ids take their time to the host, too: the next steps must do without."""

    def download(self, tensor: torch.Tensor) -> LateDownload:
        return LateDownload(tensor)
