"""What a verification found, in plain data: how far the ranks are from Transformers, and the places that differ."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """One prompt and what was generated after it."""

    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """A place where the ranks' numbers differ from Transformers' by more than rounding."""

    layer: int | None  # None: before the layers, or behind them
    what: str  # the weight, or what else is computed there
    rank: int | None  # None: it cannot be told, or all of a stage
    distance: float  # of the row that differs most, relative to its own size
    allowed: float
    rows: int  # tokens that differ
    of: int  # tokens that were compared
    is_inside: bool  # whether it was seen inside a layer, not only by what the layer hands on


@dataclass(frozen=True)
class Ids:
    """The sampled ids beside those that Transformers' logits name."""

    total: int = 0
    equal: int = 0
    near_ties: int = 0  # another id, whose logit is within the noise of the largest
    wrong: int = 0
    not_sampled: int = 0  # ids that are not the largest of the ranks' own logits

    def __add__(self, other: "Ids") -> "Ids":
        return Ids(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Findings:
    """Everything that was found of one run. Distances are relative: a norm of differences / the norm of the numbers."""

    ids: Ids
    logits_distance: float  # the median, of the prompt whose logits are furthest
    logits_allowed: float
    own_distance: float | None  # of Transformers' own run in the served dtype, from float32; None: that is float32
    num_compared: int  # modules' inputs and outputs that were compared on some rank
    layers_compared: int  # layers whose result was compared
    differences: tuple[Difference, ...]  # the first of each layer, in the order of the computation
    furthest: frozenset[tuple[int, int]]  # (sequence, position) of tokens that differ most

    @property
    def is_right(self) -> bool:
        """Whether nothing differs by more than rounding."""
        has_right_ids = not self.ids.wrong and not self.ids.not_sampled
        return has_right_ids and self.logits_distance <= self.logits_allowed and not self.differences
