"""The house stays readable and safe: sizes of files and functions, and calls that nobody may make."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for room in ("configs", "cluster", "actors", "deployments") for path in (ROOT / room).rglob("*.py"))
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50

BANNED_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "ray.cloudpickle"}
BANNED_METHODS = (
    "_object_list",
    ".all_gather_object",
    ".gather_object",
    ".scatter_object",
    ".broadcast_object",
)  # pickle
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}


def crimes(source: str, file: str) -> Iterator[str]:
    """What stands in a file that may not: modules that run what they read, and calls that do."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name in BANNED_MODULES or name in BANNED_CALLS:
                yield f"{file}:{node.lineno}: imports {name}"
        name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        if name in BANNED_CALLS or name.endswith(BANNED_METHODS):
            yield f"{file}:{node.lineno}: uses {name}"
        if isinstance(node, ast.keyword):
            shell = node.arg == "shell" and getattr(node.value, "value", None) is not False
            remote_code = node.arg == "trust_remote_code" and getattr(node.value, "value", None) is not False
            if shell or remote_code:
                yield f"{file}:{node.value.lineno}: {ast.unparse(node)}"


def long_functions(source: str, file: str) -> Iterator[str]:
    """Functions of more than MAX_FUNCTION_LINES lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{file}:{node.lineno}: {node.name} has {lines} lines"


def test_files_and_functions_stay_small() -> None:
    assert len(FILES) > 10
    problems: list[str] = []
    for path in FILES:
        source, file = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        lines = source.count("\n")
        if lines > MAX_FILE_LINES:
            problems.append(f"{file}: {lines} lines")
        problems += long_functions(source, file)
    assert not problems, "\n" + "\n".join(problems)


def test_nothing_banned_is_used() -> None:
    problems = [
        crime for path in FILES for crime in crimes(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "from torch import load",
        "def f():\n    import cloudpickle",
        "torch.load(path)",
        "yaml.load(text, Loader=x)",
        "eval(text)",
        "run = exec",
        "dist.broadcast_object_list(objects)",
        "dist.all_gather_object(out, thing)",
        "subprocess.run(command, shell=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_checker_sees(line: str) -> None:
    assert len(list(crimes(line, "x.py"))) >= 1


def test_the_checker_lets_pass() -> None:
    innocent = "import json\nrun(command, shell=False)\nmodel.eval()\nsafetensors.load(x)\nyaml.safe_load(x)\n"
    assert list(crimes(innocent, "x.py")) == []
    assert list(long_functions("def f():\n" + "    x\n" * 50, "x.py")) == ["x.py:1: f has 51 lines"]
