"""The documentation says what the code does: links, paths, commands, fields, metrics, messages."""

import argparse
import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from actors.remote.meeting import RankInfo
from configs.files import parse_args
from deployments import cli
from deployments.api.bodies import ChatBody, CompletionBody, GenerationBody
from deployments.api.prompt_fields import Message
from deployments.api.strict_body import Body
from deployments.api.token_pages import DetokenizeBody, TokenizeBody
from deployments.serve.environment import ENVIRONMENT
from tests.docs_pages import FLOORS, PAGES, as_it_should_be, bounds_of, file_map, keys, kind_of

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (*FLOORS, "tests", "docs", "examples", "benchmarks", "k8s")
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "configs/demo/README.md"])
}
ALL = pytest.mark.parametrize("page", TEXTS)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    text = TEXTS[page]
    assert f"\n{heading}\n" in text, f"{page} has no heading {heading!r}"
    level = heading.index(" ")
    return re.split(rf"^#{{1,{level}}} ", text.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, str]:
    """Rows of the tables in a text, by the code in their first cells; a first cell may name several."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            first, _, rest = line.removeprefix("| ").partition(" |")
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), rest)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_is_made_of_the_code_is_up_to_date(page: str) -> None:
    assert as_it_should_be(page) == TEXTS[page], f"{page}: run `python tests/docs_pages.py`"


def test_first_docstring_lines_are_sentences() -> None:
    for line in file_map().splitlines()[1:-1]:
        name, _, sentence = line.partition("  ")
        assert sentence.strip().endswith((".", ";", ",")) or len(sentence.strip()) > 20, f"{name}: {sentence}"


def test_every_key_says_what_it_is_and_when_to_set_it() -> None:
    for key, field in keys():
        words = field.description or ""
        assert words.endswith(".") and re.search(r"(?i)[.;,] (re|un)?(set|raise|lower)|always set", words), (
            f"{key}: {words}"
        )


# Links, paths and commands


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@ALL
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", TEXTS[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists() and file.is_relative_to(ROOT), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


@ALL
def test_files_that_are_named_exist(page: str) -> None:
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", TEXTS[page]):
        assert "__pycache__" in name or (ROOT / name).exists(), f"{page}: {name}"
    assert "tests/peers" not in TEXTS[page]


def commands(text: str) -> Iterator[list[str]]:
    """Lines of code, and code in sentences, that begin as a command does; `[...]` marks a description of one."""
    blocks = "".join(body for kind, body in FENCE.findall(text) if not kind)
    indented = re.findall(r"^    (.+)$", text, re.MULTILINE)
    for line in [*blocks.splitlines(), *indented, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]:
        command = re.sub(r"^(\$ |\.venv/bin/|[A-Z_]+=\S+ )+", "", line.strip())
        if command.startswith(("make ", "python ", "pytest ", "stagemesh ")) and not re.search(r"[\[…|&]", command):
            yield shlex.split(command, comments=True)


class Asked(Exception):
    """A command line was understood."""


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """Options of the commands that would have run."""
    found: list[argparse.Namespace] = []

    def run(options: argparse.Namespace) -> int:
        if hasattr(options, "refuse"):
            from deployments.bench import command

            command._refuse_foreign(options)
        found.append(options)
        return 0

    for module in (
        "deployments.batch.command",
        "deployments.bench.command",
        "deployments.bench.profile",
        "deployments.doctor.command",
        "deployments.plan.command",
        "deployments.verify.command",
    ):
        monkeypatch.setattr(f"{module}.run", run)
    return found


@ALL
def test_commands_are_understood(page: str, understood: list[argparse.Namespace]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pyproject = (ROOT / "pyproject.toml").read_text()
    for program, *words in commands(TEXTS[page]):
        told = f"{page}: {program} {' '.join(words)}"
        if program == "make":
            asked = [word for word in words if "=" not in word]
            assert asked == ["..."] or set(asked) <= set(targets), told
        elif program == "stagemesh" and len(words) > 1:
            assert cli.main(words) == 0, told
        elif program == "python" and words[0] == "-m":
            assert find_spec(words[1]), told
        elif program == "python":
            source = (ROOT / words[0]).read_text(encoding="utf-8")
            source += (ROOT / "benchmarks/servers.py").read_text(encoding="utf-8") if "benchmarks" in words[0] else ""
            assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--")), told
        elif "-m" in words:
            assert f'"{words[words.index("-m") + 1]}: ' in pyproject, told


def test_the_page_on_measuring_shows_both_kinds_of_bench(understood: list[argparse.Namespace]) -> None:
    for program, *words in commands(TEXTS["docs/measuring.md"]):
        if program == "stagemesh" and words[0] == "bench" and len(words) > 1:
            cli.main(words)
    assert {options.offline for options in understood} == {True, False} and len(understood) >= 5


@ALL
def test_code_that_is_shown_can_be_read(page: str) -> None:
    for kind, code in FENCE.findall(TEXTS[page]):
        if kind == "python":
            ast.parse(code)
        elif kind == "yaml":
            shown: dict[str, Any] = yaml.safe_load(code)
            applications = shown.get("applications")
            parse_args(applications[0]["args"] if applications else {"model": {"source": "some/model"}, **shown})
        else:
            assert not kind, f"{page}: code in {kind} is not checked"


# docs/api.md


def test_every_route_is_on_the_page(world: Any) -> None:
    shown = {tuple(word.split()) for word in rows(section("docs/api.md", "## Routes"))}
    there = {
        (method, route.path.replace(":path", ""))
        for route in world.app.routes
        for method in (route.methods or {"POST"}) - {"HEAD"}
    }
    assert shown == there


TAKEN: list[tuple[str, list[type[Body]], type[Body] | None]] = [
    ("## Fields of both endpoints", [GenerationBody], None),
    ("## Fields of /v1/completions alone", [CompletionBody], GenerationBody),
    ("## Fields of /v1/chat/completions alone", [ChatBody, Message], GenerationBody),
    ("## Fields of /tokenize and /detokenize", [TokenizeBody, DetokenizeBody], None),
]


@pytest.mark.parametrize(("heading", "bodies", "but"), TAKEN, ids=lambda value: str(value)[:40])
def test_every_field_that_is_taken_is_on_the_page(
    heading: str, bodies: list[type[Body]], but: type[Body] | None
) -> None:
    shown = rows(section("docs/api.md", heading))
    fields = {name: field for body in bodies for name, field in body.model_fields.items() if kind_of(field) == "taken"}
    fields = {name: field for name, field in fields.items() if but is None or name not in but.model_fields}
    assert set(shown) == set(fields)
    for name, field in fields.items():
        default, bounds, words = (cell.strip() for cell in shown[name].split("|")[:3])
        assert words, name
        for bound in bounds_of(field):
            assert re.search(rf"(?<![\d.^]){re.escape(bound)}(?!\d)", bounds), f"{name}: {bound} is not in {bounds}"
        plain = field.default
        if isinstance(plain, int | float) and not isinstance(plain, bool):
            assert default == str(plain), f"{name}: {default}"
        elif field.is_required():
            assert default == "must be sent", name


def test_every_field_that_is_refused_has_its_reason_on_the_page() -> None:
    page = section("docs/api.md", "## Fields that are passed or refused")
    _, table, reasons = re.split(r"<!-- /?other fields -->", page)
    named = {name for row in table.splitlines()[3:] for name in re.findall(r"(?:^|· )`(\w+)`", row.split(" | ")[-1])}
    assert len(named) > 10
    assert {name for name in named if f"`{name}`" not in reasons} == set()


def test_every_error_code_is_on_the_page() -> None:
    shown = set(re.findall(r"^\| [\d, ]+ \| `(\w+)` \|", section("docs/api.md", "## Errors"), re.MULTILINE))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "deployments/api").glob("*.py"))
    there = set(re.findall(r'\bcode="(\w+)"', sources))
    there |= set(re.findall(r'"(un\w+_parameter)"', sources))
    assert shown == there


# docs/operations.md


def test_every_metric_is_on_the_page(world: Any) -> None:
    shown = rows(section("docs/operations.md", "## Metrics"))
    page = world.get("/metrics").text
    there = {}
    for family in text_string_to_metric_families(page):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "replica", "le"}
        there[name] = (family.type, labels)
    assert set(shown) == set(there)
    for name, (kind, labels) in there.items():
        cell = shown[name].split("|")[0]
        assert cell.strip().startswith(kind), name
        assert labels <= set(re.findall(r"`(\w+)`", cell)), f"{name} has the labels {labels}"
        values = re.findall(rf'^{name}{{.*?(?:state|reason|cause|phase)="(\w+)"', page, re.MULTILINE)
        words = TEXTS["docs/operations.md"]
        assert all(f"`{value}`" in words for value in values), f"{name}: {values}"


def test_every_field_of_cluster_is_on_the_page(world: Any) -> None:
    shown = set(rows(section("docs/operations.md", "## /cluster")))

    def names(value: Any, prefix: str = "") -> Iterator[str]:
        if not isinstance(value, dict):
            yield prefix
        else:
            for name, inner in value.items():
                yield from names(inner, f"{prefix}.{name}" if prefix else name)

    there = set(names(world.get("/cluster").json())) - {"ranks"}
    assert shown == there | {f"ranks[].{field.name}" for field in dataclasses.fields(RankInfo)}


def test_every_kind_of_substitute_is_on_the_page() -> None:
    table = rows(section("docs/operations.md", "## What is substituted"))
    shown = {name: rest.partition("|")[0].strip() for name, rest in table.items() if name != "what"}
    there: dict[str, set[str]] = {}
    for folder, device in (("cpu", "CPU"), ("cuda", "CUDA")):
        for path in (ROOT / "actors/tensors/backends" / folder).rglob("*.py"):
            names = re.findall(r'\.put\(\s*"(\w+)"|^WHAT = "(\w+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            for name in filter(None, (first or second for first, second in names)):
                there.setdefault(name, set()).add(device)
    assert shown == {name: ", ".join(sorted(devices)) for name, devices in there.items()}


def test_the_environment_is_that_of_make_serve() -> None:
    shown = rows(section("docs/operations.md", "## Environment"))
    assert {name: rest.split("|")[0].strip() for name, rest in shown.items() if name in ENVIRONMENT} == {
        name: f"`{value}`" for name, value in ENVIRONMENT.items()
    }


# docs/troubleshooting.md


def test_every_message_that_is_quoted_is_said_by_the_code() -> None:
    """Quoted are the headings' codes, and codes with a colon behind them in lists; `…` stands for what differs."""
    said = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            said += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quotes = [
        quote.strip("` ")
        for line in TEXTS["docs/troubleshooting.md"].splitlines()
        if line.startswith("### ") or re.match(r"- `[^`]+`:", line)
        for quote in re.findall(r"(``.+?``|`[^`]+`)(?!\w)", line if line.startswith("#") else line.split("`:")[0] + "`")
    ]
    assert len(quotes) >= 35
    for quote in quotes:
        for part in filter(None, (part.strip(" ;:,.()") for part in quote.split("…"))):
            assert any(part in text for text in said), f"nothing says {part!r} of {quote!r}"


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert headings[0] == "[Unreleased]"
