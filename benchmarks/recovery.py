"""Where the time goes after a rank was killed, by phase: with survivors that can be aborted, and with one that cannot.

    python benchmarks/recovery.py [CONFIG] --rounds 3

A gang of two shards on this machine's CPU decodes, and shard 1 is killed. A GPU that spins in a kernel over symmetric
memory cannot be aborted: a transport that ignores it stands for that. Seconds, medians; the last line is JSON.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402
from ray.util.placement_group import placement_group  # noqa: E402

from actors.decisions.model.plan import make_plan  # noqa: E402
from actors.remote.actor_pool import RankActor  # noqa: E402
from actors.remote.engine import Engine  # noqa: E402
from actors.remote.gang import Gang  # noqa: E402
from actors.tensors.model.spec_reader import read_spec  # noqa: E402
from actors.words.executor import Revival  # noqa: E402
from actors.words.messages import Event, Request, SamplingParams  # noqa: E402
from cluster.topology import Topology  # noqa: E402
from configs.config import Config  # noqa: E402
from configs.files import read_config  # noqa: E402
from tests.stubborn_transport.transport import StubbornActor  # noqa: E402

NUM_TOKENS = 200
KINDS = {"can be aborted": RankActor, "cannot be aborted": StubbornActor}


def killed_once(config: Config, bundle: Any, actor_class: type[RankActor]) -> dict[str, float]:
    """Seconds by phase, and from the kill to the next id."""
    gang = type("BenchGang", (Gang,), {"actor_class": actor_class})(config, Topology(2, 1), bundle, "cpu")
    plan = make_plan(config, read_spec(ROOT / config.model.source, config.model.dtype))
    gang.start(plan, 256)
    came, ended, revivals = [time.monotonic()], threading.Event(), list[Revival]()

    def take(events: list[Event]) -> None:
        for event in events:
            came.extend([time.monotonic()] * len(event.token_ids))
            if event.finish_reason:
                ended.set()

    def revive(*asked: Any) -> Revival:
        revivals.append(gang.revive(*asked))
        return revivals[-1]

    engine = Engine(gang.executor, plan.scheduler, 256, take, revive)
    engine.start()
    try:
        engine.add(Request("one", [5, 6, 7], NUM_TOKENS, SamplingParams(0.0, min_tokens=NUM_TOKENS)))
        while len(came) < 20:
            time.sleep(0.001)
        killed = time.monotonic()
        os.kill(gang.ranks()[1].pid, signal.SIGKILL)
        if not ended.wait(300):
            raise SystemExit("the request did not end")
        pause_s = max(later - earlier for earlier, later in itertools.pairwise(came) if later > killed)
        return {"pause": pause_s, **revivals[0].seconds}
    finally:
        gang.give_up()
        engine.close()
        gang.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml", help="of a model that two shards can hold")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    asked = read_config(ROOT / options.config).model_dump()
    asked["parallel"] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1}
    asked["device"] = "cpu"
    config = Config.model_validate(asked)
    ray.init(address="local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    bundle = placement_group([{"CPU": 3}])
    ray.get(bundle.ready(), timeout=60)
    found = {}
    for name, actor_class in KINDS.items():
        rounds = [killed_once(config, bundle, actor_class) for _ in range(options.rounds)]
        found[name] = {phase: statistics.median(one[phase] for one in rounds) for phase in rounds[0]}
        print(f"{name}: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in found[name].items()), flush=True)
    ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
