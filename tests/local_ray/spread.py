"""What tests of several nodes serve and ask: a stage a node, and streams that are long enough to see something."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.node_kit import Serving, Stream
from tests.serving import until

NUM_STREAMS = 8
Tell = Callable[[str], None]


def arguments(source: Path | str, layout: tuple[int, int], **groups: dict[str, Any]) -> dict[str, Any]:
    """The `args` of a config file. A stage takes 0.5 CPUs, the replica another one: it is on the head, which has 2."""
    return {
        "model": {"source": str(source), "name": "model", "dtype": "float32", "max_model_len": 512},
        "parallel": {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1]},
        "device": "cpu",
        "cache": {"num_blocks": 512},
        "placement": {"cpus_per_rank": 0.25, "cpus_per_replica": 1.0, "strategy": "STRICT_SPREAD", "wait_s": 120.0},
    } | groups


def body(number: int, max_tokens: int = 400) -> dict[str, Any]:
    asked = {"model": "model", "prompt": f"{number}. What is a stage?", "max_tokens": max_tokens, "temperature": 0}
    return {**asked, "ignore_eos": True, "stream": True}


def begun(server: Serving) -> list[Stream]:
    """The streams, all of them under way."""
    streams = [Stream(server.url, body(number)) for number in range(NUM_STREAMS)]
    until(lambda: all(len(stream.events) > 3 for stream in streams))
    return streams
