"""Nodes that are lost, cut off, drained or out of reach, and what clients see of it; a pipeline over four nodes.

    python -m pytest -m soak tests/local_ray/test_many_nodes.py

Ray nodes in namespaces of this machine (tests/node_kit.py). Each test prints what it measured.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local_ray.spread import NUM_STREAMS, Tell, arguments, begun, body
from tests.node_kit import PORT, RAY, Nodes, Serving, Stream, all_went_on, why_not
from tests.serving import ROOT, until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
RAY_PORTS = ["--node-manager-port=6380", "--object-manager-port=6381", "--runtime-env-agent-port=6382"]
RAY_PORTS += ["--dashboard-agent-grpc-port=6383", "--dashboard-agent-listen-port=6384", "--metrics-export-port=6385"]


# A node is lost, a link cut, a node drained: one server after another's end of life


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head with replica and stage 0, and two nodes that stage 1 may be on."""
    with Nodes(tmp_path_factory.mktemp("nodes"), 3) as nodes:
        nodes.start_ray(0, cpus=2)
        for number in (1, 2):
            nodes.start_ray(number, cpus=1)
        yield nodes


@pytest.fixture(scope="module")
def server(nodes: Nodes) -> Serving:
    nodes.wait_for_ray(0, 1, 2)
    server = nodes.serve(arguments(ROOT / "configs/demo", (2, 2)))
    server.wait_until_ready()
    return server


@pytest.fixture(scope="module")
def golden(server: Serving) -> list[str]:
    """What the streams say when nobody disturbs them."""
    streams = [Stream(server.url, body(number)) for number in range(NUM_STREAMS)]
    return [stream.text() for stream in streams]


def node_of_stage(nodes: Nodes, server: Serving, stage: int) -> int:
    """The number of the node that has a stage, and has it whole."""
    (found,) = {rank["node"] for rank in server.cluster()["ranks"] if rank["stage"] == stage}
    return next(int(name.removeprefix("node")) for name, node in nodes.alive().items() if node == found)


def is_back(server: Serving, epoch: int) -> bool:
    return server.is_ready() and server.cluster()["epoch"] > epoch


def test_a_lost_node_is_replaced_by_a_spare_one(nodes: Nodes, server: Serving, golden: list[str], tell: Tell) -> None:
    before, lost = server.cluster(), node_of_stage(nodes, server, 1)
    streams = begun(server)
    moment = nodes.fail(lost)
    until(lambda: server.cluster()["state"] != "ready")
    noticed_s = time.monotonic() - moment
    until(lambda: is_back(server, before["epoch"]), every_s=0.1)
    back_s = time.monotonic() - moment
    assert all_went_on(streams, golden)
    after = server.cluster()
    assert node_of_stage(nodes, server, 1) not in (0, lost)
    assert [rank["pid"] for rank in after["ranks"][:2]] == [rank["pid"] for rank in before["ranks"][:2]]
    longest_s = max(stream.longest_pause_s(moment) for stream in streams)
    tell(
        f"node lost, a spare one there: noticed after {noticed_s:.1f} s, serves again after {back_s:.1f} s; "
        f"the longest pause of {NUM_STREAMS} streams was {longest_s:.1f} s"
    )


def test_a_lost_node_that_comes_back(nodes: Nodes, server: Serving, golden: list[str], tell: Tell) -> None:
    before, lost = server.cluster(), node_of_stage(nodes, server, 1)
    streams = begun(server)
    moment = nodes.fail(lost)
    time.sleep(10)
    nodes.start_ray(lost, cpus=1)
    started = time.monotonic()
    nodes.wait_for_ray(lost)
    until(lambda: is_back(server, before["epoch"]), every_s=0.1)
    back = time.monotonic()
    assert all_went_on(streams, golden)
    assert node_of_stage(nodes, server, 1) == lost
    longest_s = max(stream.longest_pause_s(moment) for stream in streams)
    tell(
        f"node lost, no spare one: started again after {started - moment:.1f} s, serves {back - started:.1f} s later; "
        f"the longest pause of {NUM_STREAMS} streams was {longest_s:.1f} s"
    )


def test_a_cut_link_is_found_and_streams_go_on_when_it_is_whole(
    nodes: Nodes, server: Serving, golden: list[str], tell: Tell
) -> None:
    before, far = server.cluster(), node_of_stage(nodes, server, 1)
    streams = begun(server)
    cut = nodes.cut(far)
    until(lambda: server.cluster()["state"] != "ready", within_s=60)
    found_s = time.monotonic() - cut
    assert server.status("/health") == 200 and server.status("/ready") == 503
    time.sleep(max(0.0, cut + 8 - time.monotonic()))
    mended = nodes.mend(far)
    until(lambda: is_back(server, before["epoch"]), every_s=0.1)
    back = time.monotonic()
    assert all_went_on(streams, golden)
    longest_s = max(stream.longest_pause_s(cut) for stream in streams)
    tell(
        f"link cut for {mended - cut:.1f} s: found after {found_s:.1f} s, serves {back - mended:.1f} s after it is "
        f"whole; the longest pause of {NUM_STREAMS} streams was {longest_s:.1f} s"
    )
    assert found_s < 10


def test_a_drained_node_finishes_what_runs_and_is_left(
    nodes: Nodes, server: Serving, golden: list[str], tell: Tell
) -> None:
    drained = node_of_stage(nodes, server, 1)
    spare = 3 - drained
    nodes[spare].kill()  # where it was cut off for long, Ray has given it up
    nodes.start_ray(spare, cpus=1)
    nodes.wait_for_ray(spare)
    before = server.cluster()
    streams = begun(server)
    began = time.monotonic()
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    which = ["--address", f"{nodes[0].address}:{PORT}", "--node-id", nodes.alive()[f"node{drained}"]]
    nodes.run(0, *RAY, "drain-node", *which, *why, "--deadline-remaining-seconds", "300")
    until(lambda: server.status("/ready") == 503)
    refused_s = time.monotonic() - began
    answer = server.post({**body(0), "stream": False})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_draining"), answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert all_went_on(streams, golden)

    def is_elsewhere() -> bool:
        if not server.is_ready():
            return False
        state = server.cluster()
        return bool(state["replica"] != before["replica"])

    until(is_elsewhere, every_s=0.2)
    assert node_of_stage(nodes, server, 1) == spare
    tell(f"node drained: refused after {refused_s:.1f} s, serves elsewhere after {time.monotonic() - began:.1f} s")


# Nodes that do not reach each other


@pytest.mark.parametrize("fault", ["interface", "firewall"])
def test_nodes_out_of_reach_are_named_at_the_start(tmp_path: Path, fault: str, tell: Tell) -> None:
    with Nodes(tmp_path, 2) as nodes:
        for number, cpus in ((0, 2), (1, 1)):
            nodes.start_ray(number, cpus, *RAY_PORTS)
        nodes.wait_for_ray(0, 1)
        network = {"interface": "mgmt0"} if fault == "interface" else {}
        if fault == "firewall":
            nodes.fence(1)
        server = nodes.serve(arguments(ROOT / "configs/demo", (1, 2), network=network))
        until(lambda: "all ranks have started" in server.log.read_text(), every_s=0.05)
        began = time.monotonic()
        until(lambda: "does not reach" in server.log.read_text(), every_s=0.05)
        ended_s = time.monotonic() - began
        assert server.process.wait(120) == 1
        printed = server.log.read_text()
        tell(f"{fault}: said {ended_s:.1f} s after the ranks were up\n{printed.partition('cannot be served:')[2]}")
        here = "node0 (mgmt0, 10.78.9.1)" if network else "node0 (eth0, 10.77.9.1)"
        there = "node1 (mgmt0, 10.78.9.2)" if network else "node1 (eth0, 10.77.9.2)"
        assert f"{here} does not reach {there}, port " in printed
        assert "network.interface" in printed and "Traceback" not in printed
        assert ended_s < 20


# A pipeline over four nodes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of random numbers, with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(ROOT / "configs/demo", num_hidden_layers=8, hidden_size=64, head_dim=8)
    config.intermediate_size, config.initializer_range = 96, 0.2
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "configs/demo" / name, folder)
    return folder


def generated(checkpoint: Path, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """What Transformers generates, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    limits = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}
    return [model.generate(torch.tensor([prompt]), **limits)[0, len(prompt) :].tolist() for prompt in prompts]


def test_four_stages_on_four_nodes_give_transformers_own_ids(checkpoint: Path, tmp_path: Path, tell: Tell) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [[3 + (7 * number + 11 * place) % 1000 for place in range(5 + 9 * number)] for number in range(6)]
    expected = generated(checkpoint, prompts, num_new=24)
    with Nodes(tmp_path, 4) as nodes:
        shutil.copytree(checkpoint, tmp_path / "model")
        for number, cpus in enumerate((2, 1, 1, 1)):  # one by one: Ray gives a node 30 s to start
            nodes.start_ray(number, cpus)
            nodes.wait_for_ray(number)
        server = nodes.serve(arguments(tmp_path / "model", (2, 4)))
        tell(f"4 nodes, 2 x 4 ranks: serves after {server.wait_until_ready():.1f} s")
        ranks = server.cluster()["ranks"]
        by_stage = [{rank["node"] for rank in ranks if rank["stage"] == stage} for stage in range(4)]
        assert [len(found) for found in by_stage] == [1] * 4
        assert set.union(*by_stage) == set(nodes.alive().values())
        layers = [rank["layers"] for rank in ranks[::2]]  # dealt by cost, so the last stage, with the head, has fewer
        assert [first for first, _ in layers] + [8] == [0] + [end for _, end in layers]
        asked = {"model": "model", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        for prompt, ids in zip(prompts, expected, strict=True):
            answer = server.post({**asked, "prompt": prompt}, timeout_s=120).json()
            # an id that the tokenizer lacks is nothing in Transformers' text, and a mark in ours
            said = answer["choices"][0]["text"].replace("\ufffd", "")
            assert said == tokenizer.decode(ids).replace("\ufffd", "")
            assert answer["usage"]["completion_tokens"] == len(ids)
