"""The demo over two nodes that are as far apart as machines: stages on different ones, shards of a stage on one."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import yaml

from tests.local_ray.demo import assert_trained_answers
from tests.node_kit import Nodes, why_not
from tests.serving import ROOT

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and another node, with room for a stage of the demo each."""
    with Nodes(tmp_path_factory.mktemp("nodes"), 2) as nodes:
        for number in (0, 1):
            nodes.start_ray(number, cpus=1)
        yield nodes


def arguments(**groups: dict[str, Any]) -> dict[str, Any]:
    """The `args` of the demo, on nodes that may still be starting."""
    args: dict[str, Any] = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())["applications"][0]["args"]
    args["placement"] |= {"wait_s": 400.0}
    return args | groups


def test_the_demo_answers_word_for_word_as_on_one_node(nodes: Nodes) -> None:
    nodes.wait_for_ray(0)
    server = nodes.serve(arguments())
    nodes.wait_for_ray(1)
    server.wait_until_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert_trained_answers(client, share=2)
    ranks = server.cluster()["ranks"]
    by_stage = [{rank["node"] for rank in ranks if rank["stage"] == stage} for stage in (0, 1)]
    assert [len(found) for found in by_stage] == [1, 1], "no stage is on two nodes"
    assert by_stage[0] | by_stage[1] == set(nodes.alive().values()) and len(nodes.alive()) == 2
    assert server.is_idle()
