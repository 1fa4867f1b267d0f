"""One pass of the reference beside the recordings: gives each layer what the ranks' layer got, and pairs up numbers.

B rows of the batch · T tokens · n rows of one tap · Q rows that were sampled from · V vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from actors.decisions.model.plan import Plan
from actors.tensors.verify.parts import part_of, summand_of
from actors.tensors.verify.recording import LOGITS, Rows, Tap, by_token, tensors_in
from actors.tensors.verify.reference import ALONE, BATCH, GUIDED, Call

RankRows = dict[Tap, dict[int, Rows]]  # of one sequence, by rank
Values = Callable[[int, torch.Tensor], torch.Tensor | None]  # (rank, positions [n]) → [n, *]


class Sink(Protocol):
    """Takes what a rank recorded with what the reference has in its place."""

    def __call__(
        self, tap: Tap, rank: int, ours: Rows, theirs: torch.Tensor, fair: torch.Tensor
    ) -> torch.Tensor | None:
        """Theirs is [n, *], and fair [n] says which rows had the same input → which have not, from here on."""


class GuidedPass:
    """Looks on while the reference computes one sequence; see Watcher."""

    def __init__(self, plan: Plan, ours: RankRows, sink: Sink) -> None:
        self._plan = plan
        self.chose_otherwise = False  # whether by itself the model chose other experts for some token
        self._ours = ours
        self._sink = sink
        self._taps: dict[str, list[Tap]] = defaultdict(list)  # by module, in the order of the computation
        for tap in sorted(ours, key=self._rank_in_call):
            self._taps[tap.module].append(tap)
        self._layers_name = plan.spec.layers_name
        self._num_tokens = 0
        self._calls = Counter[str]()  # of each module
        self._fair_T = torch.zeros(0, dtype=torch.bool)

    def begins(self, num_tokens: int) -> None:
        """See Watcher."""
        self._num_tokens = num_tokens
        self._calls.clear()
        self._fair_T = torch.ones(num_tokens, dtype=torch.bool)

    def enters(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """See Watcher. What the layers before made of the ranks' numbers is compared, then replaced by the ranks'."""
        tap = Tap(f"{self._layers_name}.{layer}", "in")
        self._show(tap, lambda rank, positions: hidden[GUIDED, positions.to(hidden.device)])
        return self._guide(hidden, tap, is_run_only=True)

    def leaves(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Watcher."""
        tap = Tap(f"{self._layers_name}.{self._plan.spec.num_layers - 1}", "out")
        self._show(tap, lambda rank, positions: hidden[GUIDED, positions.to(hidden.device)])
        return self._guide(hidden, tap, is_run_only=False)

    def called(self, call: Call) -> None:
        """See Watcher."""
        number, self._calls[call.name] = self._calls[call.name], self._calls[call.name] + 1
        for tap in self._taps.get(call.name, []):
            if tap.call == number and not self._is_boundary(tap):
                self._show(tap, partial(self._values, call, tap, GUIDED))
                self._note_choices(tap, partial(self._values, call, tap, ALONE))

    def ends(self, logits_BQV: torch.Tensor, positions_Q: torch.Tensor) -> None:
        """The logits of the rows that were sampled from; where the ranks' last layer is known, behind its output."""
        index = {int(position): row for row, position in enumerate(positions_Q)}
        self._show(LOGITS, lambda rank, positions: logits_BQV[GUIDED, [index[int(one)] for one in positions]])

    def _rank_in_call(self, tap: Tap) -> tuple[int, bool, int]:
        """What goes in before what comes out, and choices first: what other experts compute is not compared."""
        is_number = any(rows.values.is_floating_point() for rows in self._ours[tap].values())
        return ("in", "partial", "out").index(tap.side), is_number, tap.leaf

    def _is_boundary(self, tap: Tap) -> bool:
        """Whether `enters` or `leaves` has compared it."""
        head, _, number = tap.module.rpartition(".")
        return head == self._layers_name and (tap.side == "in" or int(number) == self._plan.spec.num_layers - 1)

    def _guide(self, hidden: torch.Tensor, tap: Tap, is_run_only: bool) -> torch.Tensor:
        """Put the ranks' rows in place of the reference's own; from then on these are fair to compare, and no others.

        `is_run_only`: a layer's attention looks back, so that what lies behind a missing row has not the same input.
        """
        for rows in self._ours.get(tap, {}).values():
            positions, values = rows.positions, rows.values
            if is_run_only:
                count = int((positions == torch.arange(len(positions))).cumprod(0).sum())
                positions, values = positions[:count], values[:count]
            if len(positions):
                hidden = hidden.clone()
                hidden[GUIDED, positions.to(hidden.device)] = values.to(hidden.device, hidden.dtype)
                self._fair_T[:] = False
                self._fair_T[positions] = True
        return hidden

    def _show(self, tap: Tap, values: Values) -> None:
        for rank, ours in self._ours.get(tap, {}).items():
            theirs = values(rank, ours.positions)
            if theirs is None:
                continue
            part = part_of(self._plan, rank, tap, theirs.reshape(len(theirs), -1).cpu(), ours.values[0].numel())
            if part is not None:
                otherwise = self._sink(tap, rank, ours, part, self._fair_T[ours.positions])
                if otherwise is not None:
                    self._fair_T[ours.positions[otherwise]] = False

    def _note_choices(self, tap: Tap, values: Values) -> None:
        for rank, ours in self._ours[tap].items():
            if not ours.values.is_floating_point():
                alone = values(rank, ours.positions)
                self.chose_otherwise |= alone is not None and not torch.equal(alone.cpu(), ours.values)

    def _values(self, call: Call, tap: Tap, row: int, rank: int, positions: torch.Tensor) -> torch.Tensor | None:
        """None where the reference has nothing by token there, as in its heads when there are as many as tokens."""
        if tap.side == "partial":
            args = [self._rows(one, row, positions) for one in call.args]
            kwargs = {name: self._rows(one, row, positions) for name, one in call.kwargs.items()}
            return summand_of(self._plan, rank, call.name, call.module, args, kwargs)
        given = (call.args, call.kwargs) if tap.side == "in" else call.output
        found = next((tensor for leaf, tensor in tensors_in(given) if leaf == tap.leaf), None)
        is_by_token = found is not None and by_token(found, BATCH, self._num_tokens) is not None
        return self._rows(found, row, positions) if is_by_token else None

    def _rows(self, tensor: Any, row: int, positions: torch.Tensor) -> torch.Tensor:
        by_tokens = by_token(tensor, BATCH, self._num_tokens)
        assert by_tokens is not None, "the ranks' rows are by token, and the model is the same"
        return by_tokens[row if len(by_tokens) == BATCH else 0, positions.to(tensor.device)]
