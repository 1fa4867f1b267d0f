"""Only backends and transports depend on the kind of a device, and each is chosen in one module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TENSORS = "actors/tensors/backends"
# Files that may read it: the backends, the transports, their choice and what measures them.
MAY_ASK = (f"{TENSORS}/", "cluster/collectives/groups.py", "cluster/collectives/cpu_transport.py")
MAY_ASK += ("cluster/collectives/cuda_transport.py", "cluster/collectives/speed.py")
SHARED = {
    "choose",
    "reference",
    "trial",
    "forms",
    "trial_steps",
    "host_memory",
}  # what lies beside the backends, for all of them


def questions(source: str, file: str) -> Iterator[str]:
    """Where a device is asked who it is: `x.device.type`, `device.type`, `x.is_cuda`, `torch.cuda`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            is_type = node.attr == "type" and ast.unparse(node.value).split(".")[-1].endswith("device")
            if is_type or node.attr in ("is_cuda", "is_cpu") or text == "torch.cuda":
                yield f"{file}:{node.lineno}: {text}"


def product() -> Iterator[tuple[str, str]]:
    for room in ("configs", "cluster", "actors", "deployments"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_only_backends_and_transports_ask_what_a_device_is() -> None:
    found = [one for file, source in product() if not file.startswith(MAY_ASK) for one in questions(source, file)]
    # An all-reduce over gloo and one over shared memory look whether a tensor is theirs; nothing is chosen by it
    found = [one for one in found if not one.startswith("cluster/collectives/") or "is_c" not in one]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line", ["x.device.type", "device.type == 'cpu'", "self._device.type", "y.is_cuda", "torch.cuda.synchronize()"]
)
def test_the_checker_sees(line: str) -> None:
    assert list(questions(line, "x.py"))
    assert not list(questions("type(device); info.device; spec.type", "x.py"))


def imports_of_backends(source: str) -> set[str]:
    """The parts of backends/ that a file imports: `cpu`, `cuda`, or what lies beside them."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == TENSORS.replace("/", "."):
            names |= {alias.name for alias in node.names}
        names |= {name.split(".")[3] for name in modules if name.startswith(TENSORS.replace("/", ".") + ".")}
    return names


def test_backends_import_neither_each_other_nor_does_anybody_import_them_but_their_choice() -> None:
    devices = {path.name for path in (ROOT / TENSORS).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert devices == {"cpu", "cuda"}
    for file, source in product():
        used = imports_of_backends(source)
        own = file.removeprefix(TENSORS + "/").partition("/")[0] if file.startswith(TENSORS + "/") else None
        if own in devices:
            assert used <= SHARED | {own}, f"{file} imports {used}"
        elif own != "choose.py":
            assert not used & devices, f"{file} imports {used & devices}"
