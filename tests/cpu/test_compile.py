"""Kernels on disk are never older than the sources that their machine code depends on."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.tensors.backends.cpu.compile import SOURCES
from cluster.collectives import compile as collectives

ROOT = Path(__file__).resolve().parents[2]

OF_FOLDER = "from cluster.collectives.compile import kernels_of\nkernel = kernels_of(Path(__file__).parent)\n"
PLAIN_NUMBA = "import numba\nkernel = lambda **options: numba.njit(cache=True)\n"
FILES = {
    "__init__.py": "",
    "compile.py": "from pathlib import Path\n{decorator}",
    "inlined.py": "from package.compile import kernel\n@kernel()\ndef scaled(x):\n    return {factor} * x\n",
    "caller.py": """from package.compile import kernel
from package.inlined import scaled
@kernel(fastmath=False)
def scaled_and_one(x):
    return scaled(x) + 1
""",
}
RUN = """
import json, numba
from package.caller import scaled_and_one
result = scaled_and_one(10.0)
stranger = numba.njit(cache=True)(json.loads)
print(json.dumps({
    "result": result,
    "loaded": sum(scaled_and_one.stats.cache_hits.values()),
    "compiled": sum(scaled_and_one.stats.cache_misses.values()),
    "folder": scaled_and_one.stats.cache_path,
    "strangers_folder": stranger.stats.cache_path,
}))
"""


def write(folder: Path, decorator: str = OF_FOLDER, factor: int = 2) -> None:
    """A package of two kernels, one of which inlines the other."""
    (folder / "package").mkdir(exist_ok=True)
    for name, source in FILES.items():
        (folder / "package" / name).write_text(source.format(decorator=decorator, factor=factor), encoding="utf-8")


def run(folder: Path, **environment: str) -> dict[str, Any]:
    """What a fresh process gets from the package in a folder."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    # Without Python's own cache of modules, which takes a change within a second and of the same length for none
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | environment
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"log": done.stderr}


def test_a_kernel_follows_a_change_of_what_it_inlines(tmp_path: Path) -> None:
    write(tmp_path, factor=2)
    assert run(tmp_path)["result"] == 21
    write(tmp_path, factor=3)
    assert run(tmp_path)["result"] == 31


def test_plain_numba_does_not(tmp_path: Path) -> None:
    """Where this fails, numba looks at what a kernel inlines, and cluster.collectives.compile can go."""
    write(tmp_path, PLAIN_NUMBA, factor=2)
    assert run(tmp_path)["result"] == 21
    write(tmp_path, PLAIN_NUMBA, factor=3)
    assert run(tmp_path)["result"] == 21


def test_what_did_not_change_is_not_compiled_again(tmp_path: Path) -> None:
    write(tmp_path)
    first, second = run(tmp_path), run(tmp_path)
    assert (first["loaded"], first["compiled"]) == (0, 1)
    assert (second["loaded"], second["compiled"]) == (1, 0)
    assert second["result"] == first["result"]


def test_kernels_lie_beside_their_source_and_other_functions_do_not(tmp_path: Path) -> None:
    write(tmp_path)
    found = run(tmp_path)
    caches = list((tmp_path / "package" / "__pycache__").glob("kernels-*"))
    assert len(caches) == 1
    assert Path(found["folder"]).parent == caches[0]
    assert "kernels-" not in found["strangers_folder"]


def test_kernels_go_home_where_their_folder_cannot_be_written_to(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "package" / "__pycache__").touch()  # a file: no folder can be made there, by root neither
    home = tmp_path / "home"
    for loaded in (0, 1):
        found = run(tmp_path, HOME=str(home))
        assert (found["result"], found["loaded"]) == (21, loaded)
        assert Path(found["folder"]).is_relative_to(home / ".cache" / "stagemesh")


def test_kernels_work_where_nothing_can_be_written_to(tmp_path: Path) -> None:
    write(tmp_path)
    for no_folder in (tmp_path / "package" / "__pycache__", tmp_path / "home"):
        no_folder.touch()
    for _ in range(2):
        found = run(tmp_path, HOME=str(tmp_path / "home"))
        assert (found["result"], found["loaded"]) == (21, 0)
        assert "kernels-" not in (found["folder"] or "")
        assert "compiled at each start" in found["log"]


def used_by_kernels(tree: ast.Module) -> set[str]:
    """Names in decorated functions, in functions that make such ones, and in constants: what machine code may hold."""
    used = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            functions = [node for node in ast.walk(statement) if isinstance(node, ast.FunctionDef)]
            if not any(function.decorator_list for function in functions) or isinstance(statement, ast.ClassDef):
                continue
            nodes = [node for part in statement.body for node in ast.walk(part)]
        elif isinstance(statement, ast.Assign):
            nodes = list(ast.walk(statement.value))
        else:
            continue
        used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return used


@pytest.mark.parametrize(
    ("compiler", "sources"),
    [
        ("cluster.collectives.compile", (Path(collectives.__file__).parent,)),
        ("actors.tensors.backends.cpu.compile", SOURCES),
    ],
)
def test_kernels_take_functions_and_constants_from_digested_sources_only(
    compiler: str, sources: tuple[Path, ...]
) -> None:
    num_files = 0
    for path in sources[-1].rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if compiler not in {node.module for node in imports}:
            continue
        num_files += 1
        used = used_by_kernels(tree)
        for node in imports:
            names = {alias.asname or alias.name for alias in node.names}
            if str(node.module).split(".")[0] in ("actors", "cluster", "configs") and names & used:
                home = Path(str(importlib.import_module(str(node.module)).__file__))
                is_digested = any(home.is_relative_to(folder) for folder in sources)
                assert is_digested, f"{path} compiles {names & used} of {node.module}"
    assert num_files >= 2


def test_the_check_of_sources_sees_functions_and_constants() -> None:
    source = """
CONSTANT = one
def plain(): return two
@kernel()
def compiled(x: three): return four(x)
def making():
    @intrinsic
    def made(): return five
"""
    assert used_by_kernels(ast.parse(source)) & {"one", "two", "three", "four", "five"} == {"one", "four", "five"}
