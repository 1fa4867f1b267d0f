"""Patience with object stores: what may pass is tried again, later and later; what cannot pass is said at once."""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

TRIES = 8
FIRST_PAUSE_S = 0.5  # doubled after each try: about a minute in all
# Said by the store for good, or a mistake in what was asked: another try would hear the same
_FINAL = (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
_MISTAKES = (NotImplementedError, ImportError, TypeError, ValueError, AttributeError, KeyError, AssertionError)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What clients of stores say where nobody has given them credentials; by name, so that none has to be installed
_WITHOUT_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "NoAuthTokenError",
    "DefaultCredentialsError",
    "RefreshError",
}
_CREDENTIALS = (
    "the credentials for it: S3 reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the machine's role "
    "(another endpoint: AWS_ENDPOINT_URL); Google GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account"
)

Result = TypeVar("Result")
Pause = Callable[[float], None]  # waits seconds


def patiently(what: str, work: Callable[[], Result], pause: Pause = time.sleep) -> Result:
    """What `work` returns, tried up to TRIES times. Raises ValueError that says `what` failed, and how it goes on.

    An OSError of a disk without room is no matter of the store, and comes as it is, at once.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return work()
        except (*_FINAL, *_MISTAKES) as error:
            raise ValueError(f"{what}: {_shown(error)}; look at the address, and at {_CREDENTIALS}") from error
        except Exception as error:  # each store has classes of its own for what passes
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise
            if type(error).__name__ in _WITHOUT_CREDENTIALS:
                raise ValueError(f"{what}: {_shown(error)}; give {_CREDENTIALS}") from error
            if attempt == TRIES:
                raise ValueError(
                    f"{what}: failed {TRIES} times, at last with {_shown(error)}; what is done is kept: start the same "
                    "command again when the store answers"
                ) from error
            logger.warning("%s: %s; trying again", what, _shown(error))
            pause(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
    raise AssertionError("the last try returns or raises")


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
