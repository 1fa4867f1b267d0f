"""What the peer comparisons share: servers that are started, waited for and ended, and clients that load them."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_itl_ms")  # vllm bench serve's names
START_S = 600


class Server:
    """A server in a session of its own, ended with everything it started."""

    def __init__(
        self, name: str, url: str, probe: str, command: list[str], environment: dict[str, str], cwd: Path = ROOT
    ) -> None:
        self.name, self.url, self._probe = name, url, probe
        self._check_free()
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115 - kept while it runs
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            cwd=cwd,
        )

    def _check_free(self) -> None:
        """What another server answers would be taken for this one's."""
        try:
            urllib.request.urlopen(self.url + self._probe, timeout=5).close()
        except urllib.error.HTTPError:
            pass
        except OSError:
            return
        raise SystemExit(f"{self.name}: something answers at {self.url} already; end it, or choose another --port")

    def wait(self, poll_s: float = 1.0) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_S:
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + self._probe, timeout=5).close()
                print(f"{self.name} is ready", flush=True)
                return
            except OSError:
                time.sleep(poll_s)
        self._log.seek(0)
        raise SystemExit(f"{self.name} does not serve:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def ours(options: argparse.Namespace, folder: Path, tp: int, pp: int) -> Server:
    """Our server behind HAProxy."""
    arguments = {
        "model": {"source": str(options.checkpoint), "name": "compared", "dtype": "bfloat16", "max_model_len": 2048},
        "parallel": {"tensor_parallel_size": tp, "pipeline_parallel_size": pp},
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
    command = [sys.executable, "-m", "deployments.serve.command", str(config)]
    return Server("ours", f"http://127.0.0.1:{options.port}", "/ready", command, {"RAY_SERVE_ENABLE_HA_PROXY": "1"})


def vllm(options: argparse.Namespace) -> Server:
    """VLLM's server."""
    command = [options.vllm, "serve", str(options.checkpoint), "--dtype", "bfloat16", "--max-model-len", "2048"]
    command += ["--tensor-parallel-size", str(options.tp), "--pipeline-parallel-size", str(options.pp)]
    command += ["--host", "127.0.0.1", "--port", str(options.port + 1)]
    cores = "|".join(map(str, range(options.tp * options.pp)))
    environment = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2"} if options.device == "cpu" else {}
    return Server("theirs", f"http://127.0.0.1:{options.port + 1}", "/health", command, environment)


def measure_by_vllm(options: argparse.Namespace, server: Server, concurrency: int) -> dict[str, float]:
    """Figures of one load by `vllm bench serve`."""
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


def measure_by_ours(options: argparse.Namespace, server: Server, concurrency: int) -> dict[str, float]:
    """The same by `stagemesh bench`."""
    command = [sys.executable, "-m", "deployments.cli", "bench", server.url, "--json", "--ignore-eos"]
    command += ["--tokenizer", str(options.checkpoint), "--concurrency", str(concurrency)]
    command += ["--num-requests", str(concurrency * options.waves)]
    command += ["--input-len", str(options.input_len), "--output-len", str(options.output_len)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{server.name}: {done.stderr}")
    (result,) = json.loads(done.stdout)["figures"]
    if result["failed"]:
        raise SystemExit(f"{server.name}: {result['failures']}")
    return {
        "output_throughput": result["output_tokens_per_s"],
        "median_ttft_ms": result["ttft_ms"]["p50"],
        "median_tpot_ms": result["tpot_ms"]["p50"],
        "p99_itl_ms": result["itl_ms"]["p99"],
    }


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Wait until all serve; end them afterwards, whatever happens, SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            server.close()


def add_layout(parser: argparse.ArgumentParser) -> None:
    """The options that every comparison has."""
    parser.add_argument("checkpoint", type=lambda text: Path(text).resolve())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--port", type=int, default=8000, help="ours; a peer's is the next one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
