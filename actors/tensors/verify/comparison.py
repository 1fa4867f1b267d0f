"""The comparison: runs the reference over what was served, and measures how far each module's rows on each rank are.

n rows of one tap · Q rows that were sampled from · V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from actors.decisions.model.plan import Plan
from actors.tensors.verify.findings import Served
from actors.tensors.verify.guided_pass import GuidedPass, RankRows
from actors.tensors.verify.recording import LOGITS, Recording, Rows, Tap
from actors.tensors.verify.reference import ALONE, Reference
from actors.tensors.verify.tolerance import beyond, rounding_unit

Key = tuple[Tap, int]  # on a rank


@dataclass
class Distances:
    """How far rows of one tap on one rank are from float32, relative to the rows' own norms."""

    ours: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)  # Transformers' own in the served dtype; empty: that is float32
    places: list[tuple[int, int]] = field(default_factory=list)  # sequence, position
    are_choices: bool = False  # whole numbers, such as the experts of a token: 0 for the same, 1 for others


@dataclass(frozen=True)
class Ending:
    """The logits of one sequence's sampled rows, each [Q, V] in float32 on the host."""

    ids: torch.Tensor  # int64 [Q]
    ours: torch.Tensor
    own: torch.Tensor | None  # Transformers', in the served dtype; None: that is float32
    exact: torch.Tensor  # Transformers', in float32
    is_chaotic: bool  # rounding may have chosen other experts for some token, and all that follows from it is another


class Comparison:
    """Compares one gang's recordings with the reference, sequence by sequence."""

    def __init__(
        self, plan: Plan, reference: Reference, recordings: Sequence[Recording], served: Sequence[Served]
    ) -> None:
        self.plan = plan
        self.distances: dict[Key, Distances] = {}  # in the order of the computation
        self.endings: list[Ending] = []
        self._reference = reference
        self._recordings = recordings
        self._served = served
        self._own: dict[Key, torch.Tensor] = {}  # Transformers' own rows of the sequence at hand
        self._sequence = 0
        self._routers = set[str]()  # modules that put out choices

    def compare(self, sequence: int) -> None:
        """Run the reference over one sequence: in the served dtype, and where that is not float32, in float32 too."""
        self._sequence, self._own, self._routers = sequence, {}, set()
        ids = _computed_ids(self._served[sequence])
        ours = self._rows_of(sequence, len(ids))
        positions = next((rows.positions for rows in ours.get(LOGITS, {}).values()), torch.zeros(0, dtype=torch.int64))
        own, own_logits = GuidedPass(self.plan, ours, self._keep_own), None
        if self.plan.spec.dtype != "float32":
            own_logits = self._reference.run(ids, positions.tolist(), own, is_exact=False).float().cpu()
            own.ends(own_logits, positions)
        exact = GuidedPass(self.plan, ours, self._measure)
        logits = self._reference.run(ids, positions.tolist(), exact, is_exact=True).float().cpu()
        exact.ends(logits, positions)
        count = len(self._served[sequence].new_ids)  # one less than there are logits, where these were no numbers
        of_ranks = [rows.values[:count].float() for _, rows in sorted(ours.get(LOGITS, {}).items())]
        if count and of_ranks:
            new_ids = torch.tensor(self._served[sequence].new_ids, dtype=torch.int64)
            own_alone = None if own_logits is None else own_logits[ALONE, :count]
            is_chaotic = own.chose_otherwise or exact.chose_otherwise or _hides_choices(ours, len(ids))
            ending = Ending(new_ids, torch.cat(of_ranks, 1), own_alone, logits[ALONE, :count], is_chaotic)
            self.endings.append(ending)

    def _rows_of(self, sequence: int, num_tokens: int) -> RankRows:
        """What the ranks recorded of a sequence, without tokens that were computed in vain behind its end."""
        found: RankRows = {}
        for recording in self._recordings:
            for tap, rows in recording.rows.items():
                rows = self._with_shared(rows, sequence) if tap.side == "in" else rows.of(sequence)
                rows = rows.take(rows.positions < num_tokens)
                if tap.side == "out" and not rows.values.is_floating_point():
                    self._routers.add(tap.module)
                if len(rows.positions):
                    found.setdefault(tap, {})[recording.rank] = rows
        return found

    def _with_shared(self, rows: Rows, sequence: int) -> Rows:
        """Its rows, and where the prefix cache spared them, the rows of another sequence that begins alike."""
        own = rows.of(sequence)
        ids, missing = _computed_ids(self._served[sequence]), int(own.positions[0]) if len(own.positions) else 0
        for other in range(len(self._served)):
            if missing and other != sequence and _computed_ids(self._served[other])[:missing] == ids[:missing]:
                before = rows.of(other)
                before = before.take(before.positions < missing)
                if len(before.positions) == missing:
                    return before.followed_by(own)
        return own

    def _keep_own(self, tap: Tap, rank: int, ours: Rows, theirs: torch.Tensor, fair: torch.Tensor) -> None:
        self._own[tap, rank] = theirs

    def _measure(
        self, tap: Tap, rank: int, ours: Rows, theirs: torch.Tensor, fair: torch.Tensor
    ) -> torch.Tensor | None:
        """Measure the rows that are fair to compare; of choices (whole numbers), say which rows chose otherwise."""
        own = self._own.get((tap, rank))
        away = _distance(ours.values.reshape(len(theirs), -1), theirs)
        own_away = None if own is None else _distance(own, theirs)
        chooses = not theirs.is_floating_point()
        if not chooses and tap.side == "out" and tap.module in self._routers:  # it decides by thresholds too
            rounding = rounding_unit(self.plan.spec.dtype)
            away, own_away, chooses = beyond(away, own_away, rounding).double(), torch.zeros_like(away), True
        distances = self.distances.setdefault((tap, rank), Distances(are_choices=chooses))
        distances.ours += away[fair].tolist()
        distances.own += [] if own_away is None else own_away[fair].tolist()
        distances.places += [(self._sequence, position) for position in ours.positions[fair].tolist()]
        if not chooses:
            return None
        return (away > 0) if own_away is None else (away > 0) | (own_away > 0)


def _hides_choices(ours: RankRows, num_tokens: int) -> bool:
    """Whether experts were chosen for tokens of which it was not recorded, as in steps that the device has captured."""
    choices = [rows for by_rank in ours.values() for rows in by_rank.values() if not rows.values.is_floating_point()]
    return bool(choices) and max(len(rows.positions) for rows in choices) < num_tokens


def _computed_ids(served: Served) -> list[int]:
    """The ids that went through the model: all but the last one that was sampled."""
    return [*served.prompt_ids, *served.new_ids[:-1]]


def _distance(values: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The norm of each row's difference relative to the row's, float64 [n]; of choices 0 or 1."""
    if not values.is_floating_point():  # in another order counts too: their weights are in that order
        return (values != exact).any(1).double()
    values, exact = values.double(), exact.double()
    sizes = torch.linalg.vector_norm(exact, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    away: torch.Tensor = torch.linalg.vector_norm(values - exact, dim=1) / sizes
    return away.nan_to_num(nan=torch.inf)
