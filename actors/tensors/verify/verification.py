"""The verification of one gang: its recordings beside Transformers' own model, on one device."""

from collections.abc import Sequence
from pathlib import Path

import torch

from actors.decisions.model.plan import Plan
from actors.tensors.verify.comparison import Comparison
from actors.tensors.verify.findings import Findings, Served
from actors.tensors.verify.recording import Recording
from actors.tensors.verify.reference import Reference
from actors.tensors.verify.verdict import findings


class Verification:
    """Compares what was served, sequence by sequence."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        device: str,
        num_threads: int,
        recordings: Sequence[Recording],
        served: Sequence[Served],
    ) -> None:
        """`device`: cpu with so many threads, or cuda:<index>. Raises ValueError when the model does not fit."""
        torch.set_num_threads(num_threads)
        self._comparison = Comparison(plan, Reference(folder, plan, torch.device(device)), recordings, served)

    def compare(self, sequence: int) -> None:
        """Compare one sequence."""
        self._comparison.compare(sequence)

    def findings(self) -> Findings:
        """What was found of all sequences that were compared."""
        return findings(self._comparison)
