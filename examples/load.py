"""Loads a model from Python, without HTTP: starts a gang of ranks on Ray, and asks it one question.

The config file is one that `make serve` takes. Uses the Ray cluster of RAY_ADDRESS, or starts one here and ends it.

    python examples/load.py configs/demo.yaml "What is a stage?"
"""

import asyncio
import queue
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.decisions.model.plan import Plan, make_plan
from actors.remote.engine import Engine
from actors.remote.gang import Gang
from actors.tensors.backends.choose import default_block_size, placed_on
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.weights.source import resolve_source
from actors.words.messages import Event, Request, SamplingParams
from cluster.placement.nodes import read_nodes, wait_for
from cluster.placement.placement import make_bundles, make_needs, resolve_device, resolve_strategy
from configs.files import read_config
from deployments.text.prompts import Conversation
from deployments.text.tokenizer import Text


def ask(gang: Gang, plan: Plan, text: Text, question: str) -> str:
    """The answer at temperature 0, of at most 100 tokens. The engine speaks token ids; text stays outside."""
    conversation = Conversation([{"role": "user", "content": question}])
    (prompt_ids,) = asyncio.run(text.encode([conversation]))
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(gang.executor, plan.scheduler, gang.num_blocks, events.put)
    engine.start()
    engine.add(Request("the only one", prompt_ids, 100, SamplingParams(temperature=0.0), text.eos_token_ids))
    answer, transcript = "", text.transcript(stops=[])
    while transcript.finish_reason is None:
        for event in events.get():
            assert event.error is None, event.error
            answer += transcript.push(event.token_ids, event.finish_reason, event.logprobs)
    engine.close()
    return answer


def main(path: str, question: str) -> str:
    """Starts the ranks of a config file, asks them, and ends them."""
    config = read_config(path)
    folder = resolve_source(config.model)
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    device = resolve_device(placed_on(config.device), read_nodes())
    # What each rank owns, before any is started
    plan = make_plan(config, read_spec(folder, config.model.dtype), default_block_size(config.device, device))
    needs = make_needs(plan.topology, config.placement, device)
    strategy = resolve_strategy(config.placement, plan.topology)
    wait_for(needs, strategy, config.placement.wait_s)  # raises a table of what is short
    placement = placement_group(make_bundles(needs), strategy)
    gang, text = Gang(config, plan.topology, placement, device), Text.load(folder)
    try:
        gang.start(plan)
        return ask(gang, plan, text, question)
    finally:
        text.close()
        gang.close()
        remove_placement_group(placement)


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
    ray.shutdown()
