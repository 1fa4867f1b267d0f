"""What the numbers of the config count; for the documentation only."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Unit:
    """What a number counts."""

    name: str


Tokens = Annotated[int, Unit("tokens")]
Sequences = Annotated[int, Unit("sequences")]
Bytes = Annotated[int, Unit("bytes")]
CPUs = Annotated[float, Unit("CPUs")]
Seconds = Annotated[float, Unit("seconds")]
