"""Asks the object store of a checkpoint's URL once, without the patience of a start. Downloads nothing."""

from actors.stores.mirror import stored_file
from actors.stores.urls import filesystem_of, is_url
from deployments.doctor.facts import Asked, Bucket


class _GivenUp(Exception):
    """A start would try again now."""


def read_bucket(asked: Asked) -> Bucket | None:
    """Whether model.source is reached and open to us; None where it is no URL."""
    if asked.source is None or not is_url(asked.source):
        return None
    url = asked.source.rstrip("/")
    try:
        stored_file(filesystem_of(url), url, "config.json", _give_up)
    except _GivenUp as error:
        return Bucket(url, _words(error.__context__ or error))
    except Exception as error:  # noqa: BLE001 - each store's client has its own errors; all are said
        return Bucket(url, _words(error))
    return Bucket(url, None)


def _give_up(seconds: float) -> None:
    raise _GivenUp


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
