"""Queries of the board and of the alerts beside what a page of metrics has; and a real Prometheus, where there is one.

`apt-get install prometheus` brings it (with promtool). What needs it is a soak, and is skipped without it.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import ROOT, free_port, until

MONITORING = ROOT / "k8s" / "monitoring"
OF_TARGETS = {"namespace", "job", "instance"}  # labels that Prometheus gives what it scrapes
_SELECTOR = re.compile(r"\b((?:stagemesh|ray|up)[\w:]*)(?:\{([^}]*)\})?(?!\w)")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
_GROUPING = re.compile(r"\bby \(([\w, ]+)\)")


def panels() -> Iterator[dict[str, Any]]:
    """Those of the board that ask something."""
    for panel in json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))["panels"]:
        if panel["type"] != "row":
            yield panel


def groups() -> list[dict[str, Any]]:
    """The groups of alerts and of recorded series."""
    found: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["spec"][
        "groups"
    ]
    return found


def filled(expression: str, interval: str = "1m", shown: str = "1h") -> str:
    """A query of the board as Grafana sends it, with all of each variable."""
    expression = expression.replace("$__rate_interval", interval).replace("$__range", shown)
    return re.sub(r"\$\w+", ".*", expression)


def not_there(expressions: Iterable[str], page: str) -> list[str]:
    """What the queries ask for and a page of metrics does not have: names, labels, values of labels."""
    values: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = values.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    missing = []
    for expression in expressions:
        there = set(OF_TARGETS)
        for name, matchers in _SELECTOR.findall(expression):
            if name == "up" or name.startswith(("ray_", "stagemesh:")):
                there |= {"model_name"}
                continue
            labels = values.get(name)
            if labels is None:
                missing.append(name)
                continue
            there |= set(labels)
            for label, operator, value in _MATCHER.findall(matchers):
                if label not in labels and label not in OF_TARGETS:
                    missing.append(f"{name}{{{label}}}")
                elif operator == "=" and label in labels and value not in labels[label]:
                    missing.append(f'{name}{{{label}="{value}"}}')
        for grouping in _GROUPING.findall(expression):
            missing += [f"by ({label}) in {expression}" for label in grouping.split(", ") if label not in there]
    return missing


def binary(name: str) -> str:
    """The path of prometheus or promtool; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return path


class Prometheus:
    """A Prometheus on a loopback port, with our alerts; it scrapes every second."""

    def __init__(self, folder: Path, jobs: dict[str, list[str]]) -> None:
        """`jobs`: by name, the URLs that are scraped."""
        self.url = f"http://127.0.0.1:{free_port()}"
        scrapes = []
        for name, urls in jobs.items():
            hosts = [url.removeprefix("http://").partition("/") for url in urls]
            scrapes.append(
                {
                    "job_name": name,
                    "metrics_path": f"/{hosts[0][2]}",
                    "static_configs": [{"targets": [host for host, *_ in hosts]}],
                }
            )
        (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": scrapes,
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._process = subprocess.Popen(
            [
                binary("prometheus"),
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("wb"),
        )

    def __enter__(self) -> Self:
        until(self._is_ready, within_s=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(20)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that a query gives now."""
        return self._asked("query", query=expression)

    def query_range(self, expression: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """The series that a query gives over a time, in seconds since 1970."""
        return self._asked("query_range", query=expression, start=start, end=end, step=step_s)

    def rules(self) -> list[dict[str, Any]]:
        """Alerts and recorded series, with their health and state."""
        found = httpx.get(f"{self.url}/api/v1/rules").json()["data"]["groups"]
        return [rule for group in found for rule in group["rules"]]

    def _asked(self, kind: str, **parameters: Any) -> list[dict[str, Any]]:
        answer = httpx.post(f"{self.url}/api/v1/{kind}", data=parameters, timeout=30).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found
