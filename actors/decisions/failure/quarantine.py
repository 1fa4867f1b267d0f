"""Which request ends ranks: the suspects after two deaths in a row, and the guilty one after a death while alone.

A request is suspect when it was in the culprit's step at two deaths in a row without having gained an id between.
Suspects run alone; only a death while alone fails a request. Deaths from outside are never told here.

What counts is what the ranks had computed: an id whose result was lost with them is not gained by computing it again.
So a request's place is how many ids the fatal step computed, and gaining means getting past that. Neither is the id
gained that the fatal step itself brought, where a rank failed so late that its neighbours had told it.
"""

from collections.abc import Mapping


class Quarantine:
    """Remembers who was there at the last death, and at which place."""

    def __init__(self) -> None:
        self._at_last_death: dict[str, int] = {}
        self.suspects: dict[str, int] = {}  # who must run alone, until it has more ids than so many

    def death(self, present: Mapping[str, int], num_ids: Mapping[str, int]) -> str | None:
        """A rank died of its own with these requests (and their places) in its step; returns who is guilty, if anybody.

        `num_ids`: prompt and generated, of every live request; those `present` that have ended are not among them.
        """
        present = {request_id: place for request_id, place in present.items() if request_id in num_ids}
        alone = next(iter(present)) if len(present) == 1 else ""
        guilty = alone if present.get(alone, 0) <= self.suspects.get(alone, -1) else None
        self.suspects = {name: place for name, place in self.suspects.items() if num_ids.get(name, place + 1) <= place}
        reached = {request_id: max(place, num_ids[request_id]) for request_id, place in present.items()}
        for request_id, place in present.items():
            if place <= self._at_last_death.get(request_id, -1):
                self.suspects[request_id] = reached[request_id]
        self._at_last_death = reached
        if guilty is not None:
            self.suspects.pop(guilty, None)
        return guilty
