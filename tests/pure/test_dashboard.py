"""The board and the alerts: made of what k8s/dashboard.py says, and every query asks for series that a replica has."""

import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from actors.decisions.schedule.phase_clock import PHASES
from actors.remote.meeting import RankInfo
from deployments.api.key_ring import KeyRing
from k8s.dashboard import OUT, ROWS, VARIABLES, text
from tests.kustomize import render
from tests.prometheus import MONITORING, binary, filled, groups, not_there, panels
from tests.serving import ROOT

KEY = "sk-abcdefghijklmnopqrst"
RULE = {
    "type": "object",
    "required": ["expr"],
    "additionalProperties": False,
    "properties": {
        "alert": {"type": "string", "pattern": "^Stagemesh[A-Za-z]+$"},
        "record": {"type": "string", "pattern": "^[a-z_][a-z0-9_:]*$"},
        "expr": {"type": "string"},
        "for": {"type": "string", "pattern": r"^\d+[smh]$"},
        "labels": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"severity": {"enum": ["critical", "warning"]}},
        },
        "annotations": {"type": "object", "required": ["summary"], "additionalProperties": {"type": "string"}},
    },
    "oneOf": [{"required": ["alert", "labels", "annotations"]}, {"required": ["record"]}],
}
GROUP = {
    "type": "object",
    "required": ["name", "rules"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "rules": {"type": "array", "minItems": 1, "items": RULE}},
}


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in groups() for rule in group["rules"] if "alert" in rule}


@pytest.fixture
def page(make_world: Any) -> str:
    """Of a replica with everything: keys, two stages, spares, and a request that was answered."""
    seconds = dict.fromkeys(PHASES, 1.0)
    ranks = [RankInfo(rank, rank, 0, "node", 7, "cpu", (0, 2), 100, 0.5, seconds) for rank in range(2)]
    ring = KeyRing("env:KEYS", {"KEYS": f"alice: {KEY}"})
    world = make_world(ring=ring, ranks=lambda: ranks, num_spares=lambda: [0, 0])
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6}
    assert world.post("/v1/completions", body, headers=headers).status_code == 200
    world.wait_until_idle()
    return world.get("/metrics").text


def test_the_file_is_what_the_generator_makes() -> None:
    assert OUT.read_text(encoding="utf-8") == text(), "run `python k8s/dashboard.py`"


def test_every_query_of_the_board_finds_its_series(page: str) -> None:
    assert not_there(queries(), page) == []
    assert len(queries()) > 40


def test_every_query_of_the_alerts_finds_its_series(page: str) -> None:
    rules = [rule for group in groups() for rule in group["rules"]]
    assert not_there((rule["expr"] for rule in rules), page) == []
    recorded = {rule["record"] for rule in rules if "record" in rule}
    used = {name for rule in rules for name in re.findall(r"stagemesh:[\w:]+", rule["expr"])}
    assert used == recorded
    for rule in alerts().values():
        labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert labels <= {"model_name", "replica", "cause", "instance", "job"}


@pytest.mark.parametrize(
    ("query", "missing"),
    [
        ("sum(rate(stagemesh_step_total[1m]))", ["stagemesh_step_total"]),
        ('stagemesh_engine_state{stat="ready"}', ["stagemesh_engine_state{stat}"]),
        ('stagemesh_engine_state{state="red"}', ['stagemesh_engine_state{state="red"}']),
        ("sum by (stages) (stagemesh_spare_ranks)", ["by (stages) in sum by (stages) (stagemesh_spare_ranks)"]),
        ('rate(stagemesh_recovery_seconds_bucket{le="5"}[1m])', ['stagemesh_recovery_seconds_bucket{le="5"}']),
    ],
)  # fmt: skip
def test_a_query_for_something_else_is_found(page: str, query: str, missing: list[str]) -> None:
    assert not_there([query], page) == missing


def test_panels_have_places_of_their_own_and_say_what_they_show() -> None:
    taken = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert all(target["legendFormat"] for target in panel["targets"])
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles) == sum(len(row) for row in ROWS.values())
    assert {word for query in queries() for word in re.findall(r"\$(?!__)(\w+)", query)} == set(VARIABLES)


def test_the_manifests_hold_the_board_for_grafanas_sidecar() -> None:
    (found,) = [one for one in render(MONITORING) if one["kind"] == "ConfigMap"]
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert found["data"] == {"dashboard.json": text()}
    assert len(text()) < 200_000, "kubectl apply keeps a copy in an annotation of at most 256 KiB"


def test_the_alerts_are_rules_as_the_operator_takes_them() -> None:
    (found,) = [one for one in render(MONITORING) if one["kind"] == "PrometheusRule"]
    assert set(found["spec"]) == {"groups"}
    for group in found["spec"]["groups"]:
        jsonschema.validate(group, GROUP)


def test_every_alert_has_its_words_in_the_documentation() -> None:
    section = (
        (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("\n## Alerts\n")[2].partition("\n## ")[0]
    )
    shown = dict(re.findall(r"^\| `(Stagemesh\w+)` \| (\w+)", section, re.MULTILINE))
    assert shown == {name: rule["labels"]["severity"] for name, rule in alerts().items()}


def test_a_share_of_requests_is_one_of_the_same_routes() -> None:
    above, below = alerts()["StagemeshServerErrors"]["expr"].split(" / ")
    assert "status" in above
    assert re.findall(r'route=~"[^"]+"', above) == re.findall(r'route=~"[^"]+"', below) != []


@pytest.mark.soak
def test_promtool_reads_all_queries_and_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    promtool = binary("promtool")
    board = [{"record": f"panel:{number}", "expr": filled(query)} for number, query in enumerate(queries())]
    rules = {"groups": [*groups(), {"name": "board", "rules": board}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    checked = subprocess.run([promtool, "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    (tmp_path / "test.yaml").write_text((ROOT / "tests/data/alerts.yaml").read_text(encoding="utf-8"))
    fired = subprocess.run([promtool, "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True)
    assert fired.returncode == 0, fired.stdout + fired.stderr
    tried = yaml.safe_load((tmp_path / "test.yaml").read_text())["tests"]
    names = {case["alertname"] for one in tried for case in one["alert_rule_test"] if case.get("exp_alerts")}
    assert names == set(alerts())
