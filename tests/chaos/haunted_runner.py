"""The Runner of a rank that obeys spells. Imported on the rank only: it needs torch."""

from pathlib import Path
from typing import Any

import torch

from actors.tensors.launched import Done, Launched
from actors.tensors.runner import Runner
from actors.tensors.sequence_table import StepTensors
from actors.words.messages import StepBatch
from tests.chaos.faults import ACTIONS, Haunt, Spell


def haunted_runner(folder: Path) -> type[Runner]:
    """A class in place of Runner."""

    class HauntedRunner(Runner):
        due: dict[int, Spell]  # by sequence: what acts in this step
        sick_rows: list[int]  # tokens whose activations become NaN

        def load(self, *args: Any, **kwargs: Any) -> Any:
            report = super().load(*args, **kwargs)
            self.haunt, self.due, self.sick_rows = Haunt(self.shard.rank, folder), {}, []
            assert self.model is not None
            first = f"{self.plan.spec.layers_name}.{self.shard.layers[0]}"
            layer: Any = self.model.module.get_submodule(first)
            layer.register_forward_hook(self._inside)
            return report

        def launch(self, step: StepBatch) -> Launched:
            self.step, self.due = step, self.haunt.due(step) if step.step >= 0 else {}  # else: warm-up
            self._act("before")
            result = super().launch(step).take()
            self._act("after")
            return Done(result)

        def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
            sampling = [entry.seq for entry in self.step.entries if entry.sample]
            rows = tensors.logits_rows_Q.tolist()[: len(sampling)]
            spells = [self.due.get(seq) for seq in sampling]
            self.sick_rows = [row for row, spell in zip(rows, spells, strict=True) if spell and spell.act == "nan"]
            return super().forward(tensors, state)

        def _inside(self, layer: Any, args: Any, output: Any) -> None:
            """After the rank's first layer: the other ranks wait in their all-reduce, or for the hop."""
            self._act("inside")
            if self.sick_rows:
                hidden_1TH = output[0] if isinstance(output, tuple) else output
                hidden_1TH[0, self.sick_rows] = float("nan")

        def _act(self, point: str) -> None:
            for spell in self.due.values():
                if spell.point == point and spell.act != "nan":
                    ACTIONS[spell.act]()

    return HauntedRunner
