"""Finds the request that ends ranks: suspect after two deaths in a row, guilty after a death while it ran alone.

A request is suspect when it was in the culprit's step at two deaths in a row without having gained an id in between.
Suspects run alone; only a death while it runs alone fails a request. Deaths from outside do not count.

An id counts as gained only when the request gets past the fatal step: how many ids it has then is its `num_ids_after`.
Ids that the fatal step computed are not gained by computing them again, even where another rank reported them before
the culprit failed.
"""

from collections.abc import Mapping


class Quarantine:
    """Remembers the requests of the last fatal step, and the suspects."""

    def __init__(self) -> None:
        self._at_last_death: dict[str, int] = {}  # request → ids that it must get past to have gained one
        self.suspects: dict[str, int] = {}  # request → it must run alone until it has more ids than this

    def death(self, num_ids_after: Mapping[str, int], num_ids: Mapping[str, int]) -> str | None:
        """Record that a rank ended by itself → the guilty request, if there is one.

        `num_ids_after`: of the requests in the culprit's step. `num_ids`: of every live request, prompt and generated;
        a request that has ended meanwhile is not among them.
        """
        present = {name: count for name, count in num_ids_after.items() if name in num_ids}
        alone = next(iter(present)) if len(present) == 1 else ""
        guilty = alone if present.get(alone, 0) <= self.suspects.get(alone, -1) else None
        self.suspects = {name: count for name, count in self.suspects.items() if num_ids.get(name, count + 1) <= count}
        reached = {name: max(count, num_ids[name]) for name, count in present.items()}
        for request_id, count in present.items():
            if count <= self._at_last_death.get(request_id, -1):
                self.suspects[request_id] = reached[request_id]
        self._at_last_death = reached
        if guilty is not None:
            self.suspects.pop(guilty, None)
        return guilty
