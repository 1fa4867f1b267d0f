"""Compares `stagemesh plan` with the import of torch and Transformers alone, in turn in one run.

    python benchmarks/plan_speed.py [--rounds N] CONFIG...

CONFIG: a config file or a model's folder, as for `stagemesh plan`. Both are processes of their own, offline, one after
the other in each round; a ratio is that of their medians. Commands that refuse a model count as well.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import torch, transformers; from transformers import AutoModelForCausalLM, PreTrainedModel"
MOST = 2.0  # how much longer a plan may take


def main() -> int:
    """Print a row for each config; 1 where one takes more than MOST times as long, or ends with a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    options = parser.parse_args()
    is_slow = False
    print(f"{'config':58} {'import s':>9} {'plan s':>7} {'ratio':>6}")
    for config in options.configs:
        alone, plans = [], []
        for _ in range(options.rounds):
            alone.append(seconds(["-c", IMPORTS])[0])
            taken, said = seconds(["-m", "deployments.cli", "plan", config])
            plans.append(taken)
        base, plan = statistics.median(alone), statistics.median(plans)
        is_slow |= plan > MOST * base or "Traceback" in said
        note = "  TRACEBACK" if "Traceback" in said else ""
        print(f"{Path(config).name:58} {base:9.2f} {plan:7.2f} {plan / base:6.2f}{note}", flush=True)
    return int(is_slow)


def seconds(arguments: list[str]) -> tuple[float, str]:
    """How long a Python process takes, and what it says on stderr."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    return time.perf_counter() - began, done.stderr


if __name__ == "__main__":
    sys.exit(main())
