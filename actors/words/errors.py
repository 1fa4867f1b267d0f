"""The errors that cross rooms: each says who is at fault and what to do next."""


class GangFailure(RuntimeError):
    """A rank died, failed or fell silent: no step of this epoch will end. Handled by the engine."""


class IntegrityError(RuntimeError):
    """Our own books do not add up; the message has the numbers. Handled by the engine: it begins anew."""


class EngineStopped(RuntimeError):
    """The engine takes no request any more. Handled at the HTTP edge: 503."""


class CheckpointError(ValueError):
    """A checkpoint cannot be served as it is: names the file and the tensor. Handled at start-up."""


class UnsupportedModel(ValueError):
    """A model that cannot be served correctly: names the family and the reason. Handled at start-up."""
