"""Compares `stagemesh plan` with the import of torch and of Transformers' model code alone, in turn in one run.

    python benchmarks/plan_speed.py [--rounds N] CONFIG...

CONFIG: a config file or a model's folder, as for `stagemesh plan`. All are processes of their own, offline. Their CPU
time is compared, which others on the machine disturb less than the clock; wall time stands beside it. The import is
timed before every fourth plan, and a ratio is that of medians. Commands that refuse a model count as well.
"""

import argparse
import os
import resource
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
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    options = parser.parse_args()
    imports: list[float] = []
    plans: dict[str, list[float]] = {config: [] for config in options.configs}
    failed = set()
    for number, config in enumerate(options.configs * options.rounds):
        if number % 4 == 0:
            imports.append(measured(["-c", IMPORTS])[0])
        cpu_s, wall_s, said = measured(["-m", "deployments.cli", "plan", config])
        plans[config].append(cpu_s)
        failed |= {config} if "Traceback" in said else set()
        print(f"{Path(config).name:58} cpu {cpu_s:6.2f} s  wall {wall_s:6.2f} s", file=sys.stderr, flush=True)
    base = statistics.median(imports)
    print(f"import alone: {base:.2f} s of CPU time, median of {len(imports)}")
    ratios = {config: statistics.median(taken) / base for config, taken in plans.items()}
    for config, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        print(f"{Path(config).name:58} {ratio:5.2f}{'  TRACEBACK' * (config in failed)}")
    return int(bool(failed) or max(ratios.values()) > MOST)


def measured(arguments: list[str]) -> tuple[float, float, str]:
    """CPU seconds and wall seconds of a Python process, and what it says on stderr."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, time.perf_counter() - began, done.stderr


if __name__ == "__main__":
    sys.exit(main())
