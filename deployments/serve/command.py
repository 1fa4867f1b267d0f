"""`make serve`: serves one config file until Ctrl-C; says what happens, when it is ready, or why it cannot serve.

    python -m deployments.serve.command CONFIG [--dashboard]

It does what `serve run CONFIG` does, in this one process. Exit codes: 0 stopped by Ctrl-C or SIGTERM, 1 cannot serve,
2 a mistake in the config file or on the command line, 130 a second Ctrl-C cut the shutdown short.
A Ray cluster that runs already (RAY_ADDRESS, or `ray start`) is used and left running; else one is started and ended.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from configs.config import Config
from configs.files import read_application, read_config, read_document
from deployments.serve.descendants import adopt_orphans, children, end_children
from deployments.serve.endpoint import Endpoint
from deployments.serve.proxy import Proxy
from deployments.serve.reasons import for_people, is_final
from deployments.serve.schema import check_schema

POLL_S = 0.1  # between two looks at Serve until it is ready
WATCH_S = 5.0  # between two looks once it is ready
QUIET_S = 10.0  # at most this long without a line while waiting
ENDING_S = 10.0  # for replicas to say that they have drained; on top of timeouts.drain_s
SHUTDOWN_S = 45.0  # for the whole shutdown, on top of timeouts.drain_s; then the processes left are killed


class CannotServe(Exception):
    """Serving cannot start or go on; the message says why, for people."""


@dataclass
class Served:
    """What is being served and where, and what this command has started for it."""

    path: str
    config: Config
    app: dict[str, Any]
    endpoint: Endpoint
    dashboard: bool
    started_ray: bool = False
    deployed: bool = False
    proxy: Proxy | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """The Serve application's name."""
        return str(self.app.get("name", "default"))

    def say(self, text: str) -> None:
        """One line for people, with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Serve until stopped, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make serve", description="Serve a model from a Serve config file.")
    parser.add_argument("config", help="a Serve config file, for example configs/demo.yaml")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard too (some seconds slower)")
    options = parser.parse_args(argv)
    try:
        served = read(options.config, dashboard=options.dashboard)
        served.say(f"reading {served.path}")
        proxy = served.proxy = make_proxy(served)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return run(served, proxy.news)
    finally:
        proxy.remove_files()


def make_proxy(served: Served) -> Proxy:
    """Choose the proxy, and complete the environment for it. Raises ValueError."""
    try:
        return Proxy(served.endpoint.tls, served.config, os.environ)
    except ValueError as error:
        raise ValueError(f"{served.path}: {error}") from None


def run(served: Served, news: list[str]) -> int:
    """Serve until stopped → the exit code. `news`: what is said before Ray starts."""
    try:
        check_schema(served.path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for line in news:
        served.say(line)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    adopt_orphans()
    code = 1
    try:
        start_ray(served)
        check_app(served)
        deploy(served)
        wait_until_ready(served)
        watch(served)
    except (KeyboardInterrupt, SystemExit):  # SystemExit: from Ray's SIGTERM handler, which stands while it starts
        served.say("stopping; what runs is finished first (Ctrl-C again to hurry)")
        code = 0
    except CannotServe as error:
        print(f"\n{served.path} cannot be served:\n\n{error}\n", file=sys.stderr, flush=True)
    except Exception:  # noqa: BLE001 - a bug of ours: its traceback is printed, and the shutdown still runs
        traceback.print_exc()
    stop(served)
    return code


def read(path: str, *, dashboard: bool) -> Served:
    """Read and check the config file, and that its port is free. Raises ValueError, one line a problem."""
    config, app = read_config(path), read_application(path)
    try:
        endpoint = Endpoint.of(read_document(path), app)
        endpoint.check_free()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Served(path, config, app, endpoint, dashboard)


def start_ray(served: Served) -> None:
    """Join the Ray cluster that runs, or start one on this machine. Raises CannotServe."""
    served.say("starting Ray")
    import ray

    logging.basicConfig(format="%(message)s")
    for package in ("cluster", "actors", "deployments"):
        logging.getLogger(package).setLevel(logging.INFO)
    # It warns that token authentication is on, which is Ray's default.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        ray.init(namespace="serve", include_dashboard=served.dashboard, logging_level="WARNING")
    except (ConnectionError, RuntimeError) as error:
        hint = "if RAY_ADDRESS names a cluster, it must run, and take our token (RAY_AUTH_MODE=token or disabled)"
        raise CannotServe(f"Ray: {error}; {hint}") from None
    signal.signal(signal.SIGTERM, _interrupt)  # ray.init put its own handler there, which would not stop Serve
    served.started_ray = bool(children())
    resources = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
    amounts = ", ".join(f"{value:g} {key}" for key, value in sorted(resources.items())) or "no CPU"
    served.say(f"Ray is up ({'started here' if served.started_ray else 'a cluster that ran already'}): {amounts}")


def check_app(served: Served) -> None:
    """Build the application once here, where its error can be shown. Raises CannotServe, within a second.

    Serve builds it in a Ray task that is tried four times, and reports the error inside several tracebacks.
    """
    from ray import serve

    if serve.status().applications:
        raise CannotServe("Serve runs other applications on this Ray cluster already: use `serve deploy` there.")
    module, _, builder = str(served.app.get("import_path", "")).partition(":")
    try:
        getattr(importlib.import_module(module), builder)(served.app.get("args", {}))
    except Exception:  # noqa: BLE001 - whatever it is, people get to read it
        raise CannotServe(for_people(traceback.format_exc())) from None


def deploy(served: Served) -> None:
    """What `serve run --non-blocking` does, by its own code. Raises CannotServe."""
    from ray.serve.scripts import cli

    served.say("starting Serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    output = io.StringIO()
    served.deployed = True
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            cli.main(["run", served.path, "--non-blocking"], standalone_mode=False)
    except (Exception, SystemExit):  # noqa: BLE001 - whatever it is, people get to read it
        raise CannotServe(for_people(output.getvalue() + traceback.format_exc())) from None


def wait_until_ready(served: Served) -> None:
    """Wait until GET /ready answers 200, and print each change. Raises CannotServe."""
    said, said_at = "", time.monotonic()
    while True:
        status, news, errors = look(served)
        if status in ("DEPLOY_FAILED", "UNHEALTHY") or any(is_final(error) for error in errors):
            raise CannotServe("\n".join(for_people(error) for error in errors) or f"Serve says {status}.")
        if status == "RUNNING" and served.endpoint.is_ready():
            break
        if news != said or time.monotonic() - said_at > QUIET_S:
            said, said_at = news, time.monotonic()
            served.say(news)
        time.sleep(POLL_S)
    question = {"role": "user", "content": "What is a stage?"}
    body = {"model": served.config.served_name, "messages": [question], "stream": True}
    key = ' -H "Authorization: Bearer $KEY"' if served.config.api.keys else ""
    served.say(f"ready: {served.endpoint.url}")
    print(
        f"\ncurl -N {served.endpoint.url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"  -d {shlex.quote(json.dumps(body))}\n\nCtrl-C stops it.",
        flush=True,
    )


def watch(served: Served) -> NoReturn:
    """Print changes until Ctrl-C. Raises CannotServe when Serve gives up, or is gone."""
    said = ""
    while True:
        time.sleep(WATCH_S)
        try:
            status, news, errors = look(served)
        except Exception as error:  # noqa: BLE001 - Ray has many; all mean that the cluster does not answer
            raise CannotServe(f"the Ray cluster is gone: {error}") from None
        if status in ("DEPLOY_FAILED", "NOT_STARTED"):
            raise CannotServe("\n".join(for_people(error) for error in errors) or f"Serve says {status}.")
        if said and news != said:
            served.say(news)
        said = news


def look(served: Served) -> tuple[str, str, list[str]]:
    """The application's status, the same in words, and Serve's error messages (tracebacks in them)."""
    from ray import serve

    app = serve.status().applications.get(served.name)
    if app is None:
        return "NOT_STARTED", "waiting for Serve", []
    words = [f"{served.name} {app.status.value}"]
    errors = [app.message] if app.message and app.status.value in ("DEPLOY_FAILED", "UNHEALTHY") else []
    for name, deployment in app.deployments.items():
        replicas = ", ".join(f"{count} {state}" for state, count in sorted(deployment.replica_states.items()))
        words.append(f"{name}: {replicas or deployment.status.value}")
        if "Traceback" in deployment.message and deployment.message not in errors:
            errors.append(deployment.message)
            words.append(for_people(deployment.message))
    return app.status.value, "; ".join(words), errors


def stop(served: Served) -> None:
    """End the application, and Ray where we started it; nothing that we started is left after this."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, partial(_hurry, served))
    signal.alarm(int(SHUTDOWN_S + served.config.timeouts.drain_s))
    import ray
    from ray import serve

    # Ray prints at length, in red, that its own actors end; from here on nobody needs to read anything.
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        with contextlib.suppress(Exception):
            if served.deployed:
                drain(served)
        with contextlib.suppress(Exception):
            if served.deployed:
                serve.shutdown()
        with contextlib.suppress(Exception):
            ray.shutdown()
    end_children(patience_s=3.0)
    served.say("stopped")


def drain(served: Served) -> None:
    """Let all replicas finish what runs, as `serve.shutdown` ends the proxies, and so all streams, immediately."""
    from ray import serve

    if look(served)[0] == "RUNNING":
        timeout_s = served.config.timeouts.drain_s + ENDING_S
        serve.get_app_handle(served.name).broadcast("drain").results(timeout_s=timeout_s)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _hurry(served: Served, number: int, frame: object) -> None:
    end_children(patience_s=0.0)
    if served.proxy is not None:
        served.proxy.remove_files()
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
