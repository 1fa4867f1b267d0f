"""README's file map says of every module what its first docstring line says."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- file map -->", "<!-- /file map -->"


def file_map() -> str:
    """The block as README should have it. To print it: python tests/pure/test_readme.py."""
    rows = []
    for room in ("configs", "cluster", "actors", "deployments"):
        for path in sorted(
            (ROOT / room).rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path)
        ):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring, (
                f"{path.relative_to(ROOT)}: no docstring; its first line says in one sentence what it owns"
            )
            name = path.relative_to(ROOT).as_posix().removesuffix("__init__.py")
            rows.append((name, docstring.splitlines()[0]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {sentence}" for name, sentence in rows]
    return "\n".join([BEGIN, "```", *lines, "```", END])


def test_readme_has_the_file_map() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BEGIN in readme and END in readme, f"README.md: put this into it:\n{file_map()}"
    found = readme[readme.index(BEGIN) : readme.index(END) + len(END)]
    assert found == file_map(), f"README.md: its file map is not what the modules say; put this there:\n{file_map()}"


def test_first_docstring_lines_are_sentences() -> None:
    for line in file_map().splitlines()[2:-2]:
        name, _, sentence = line.partition("  ")
        assert sentence.strip().endswith((".", ";", ",")) or len(sentence.strip()) > 20, f"{name}: {sentence}"


if __name__ == "__main__":
    print(file_map())
