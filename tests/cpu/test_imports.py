"""What is imported when: a start is mostly imports, and so is the return of a lost rank."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from actors.remote.imports import compiler_left_out

with compiler_left_out():
    import actors.remote.rank
heavy = {"torch._dynamo", "torch.distributed.tensor", "sympy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import torch
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo.config.recompile_limit

kept = sys.modules["torch._dynamo"]
with compiler_left_out():
    import torch._dynamo
assert torch._dynamo is kept is sys.modules["torch._dynamo"]
"""


@pytest.mark.timeout(120)
def test_the_compiler_is_left_out_and_can_be_imported_later() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(60)
def test_a_replica_asks_for_its_ranks_before_it_imports_torch() -> None:
    """Their processes start and import while it does: else the start takes two seconds more."""
    program = (
        "import sys, deployments.app, deployments.serve.drain, deployments.serve.replica; "
        "print({'torch', 'transformers', 'numba'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
