"""The actor of a rank whose steps are recorded, for the verification."""

from typing import Any

from actors.remote.actor_pool import RankActor


class RecordingActor(RankActor):
    """A RankActor that keeps what its rank computes; see actors.tensors.verify.recorder."""

    places: frozenset[tuple[int, int]] = frozenset()  # sequence and position of tokens to keep more of

    def make_runner(self, *parts: Any) -> Any:
        """See RankActor."""
        from actors.tensors.verify.recorder import RecordingRunner

        plan, rank, neighbors, backend = parts
        self._recording_runner = RecordingRunner(plan, rank, neighbors, backend, self.places)
        return self._recording_runner

    def recording(self) -> Any:
        """Everything that was recorded; to be asked for once the rank has left its loop."""
        return self._recording_runner.recorder.recording().packed()


def recording_actor(places: frozenset[tuple[int, int]]) -> type[RecordingActor]:
    """The class for a gang that keeps more of these tokens."""
    return type("PlacedRecordingActor", (RecordingActor,), {"places": places})
