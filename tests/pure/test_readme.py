"""The front page: short, one picture whose every name exists, no figure that docs/performance.md does not have."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.docs_pages import FLOORS, file_map

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PICTURE = ROOT / "docs/architecture.svg"
SVG = "{http://www.w3.org/2000/svg}"


def texts(kind: str | None = None) -> list[str]:
    """What the picture shows, or only what has this class."""
    found = ElementTree.parse(PICTURE).getroot().iter(f"{SVG}text")
    return ["".join(text.itertext()).strip() for text in found if kind is None or kind in text.get("class", "").split()]


def test_it_is_short_and_shows_the_picture() -> None:
    assert len(README.splitlines()) <= 150
    assert "(docs/architecture.svg)" in README


def test_it_has_the_two_commands_and_a_map_of_all_pages() -> None:
    assert "\n    make serve " in README and "\n    make test " in README
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README, f"README.md does not lead to {page.name}"


def test_its_figures_are_those_of_the_performance_page() -> None:
    performance = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    section = README.partition("## Speed")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+ \| [\d.]+ \| [\d.]+) \|$", section, re.MULTILINE)
    assert len(rows) >= 4
    for name, figures in rows:
        assert f"| {figures} |" in performance, f"{name}: {figures} is not in docs/performance.md"
    assert "0433da0" in section and "0433da0" in performance


def test_every_path_of_the_picture_exists() -> None:
    """Folders by their whole path, and on a floor's line the rooms of that floor."""
    shown = texts("path")
    whole = [text for text in shown if "/" in text]
    assert len(whole) >= 4
    for path in whole:
        assert (ROOT / path).is_dir(), path
    rooms = [text.split(" · ") for text in shown if "/" not in text]
    assert len(rooms) == len(FLOORS)
    for floor, names in zip(reversed(FLOORS), rooms, strict=True):
        folders = {path.parent.name for path in (ROOT / floor).glob("*/__init__.py")}
        if folders:
            assert set(names) == folders, f"{floor} has other rooms"
        else:
            assert set(names) == {path.name for path in (ROOT / floor).glob("*.py")} - {"__init__.py"}


def test_every_word_of_the_picture_is_used() -> None:
    """Its bold words are floors or in the glossary; all others occur on the architecture page or in the file map."""
    glossary = ARCHITECTURE.partition("## Words")[2].partition("\n## ")[0]
    known = {word for cell in re.findall(r"^\| ([\w, ]+) \|", glossary, re.MULTILINE) for word in cell.split(", ")}
    bold = {word for text in texts("word") for word in re.findall(r"[a-z]+", text)}
    assert bold - {"client", "engine"} <= known | set(FLOORS)
    used = set(re.findall(r"[a-z]+", (ARCHITECTURE + file_map()).lower()))
    for text in texts():
        assert set(re.findall(r"[a-z]+", text.lower())) <= used, text
