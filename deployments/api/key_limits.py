"""What each key may use: requests and tokens a minute, and requests at once; what is above gets 429."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from configs.keys import ApiKey, KeyLimits
from deployments.api.errors import ApiError, Headers


def _header(kind: str, name: str) -> bytes:
    return f"x-ratelimit-{kind}-{name}".encode()


LIMIT_HEADERS = [_header(kind, name) for name in ("requests", "tokens") for kind in ("limit", "remaining", "reset")]
_CONCURRENT_RETRY_S = 1  # when a running request of the key will end is not known


class Bucket:
    """An allowance a minute that fills up evenly. What is taken may exceed it: the debt is worked off first."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What is left; negative: a debt."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: int) -> None:
        """Take so much, whatever is left."""
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        """Until so much is left, if nothing is taken meanwhile."""
        return max(0.0, (level - self.level) * 60 / self.per_minute)


class KeyAccount:
    """What one key has used, and what it may still use. Used in the event loop's thread."""

    def __init__(self, name: str, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.num_requests = 0  # let in
        self.num_refused = 0  # for a limit of the key
        self.num_running = 0
        self._clock = clock
        self.set_limits(limits)

    def set_limits(self, limits: KeyLimits) -> None:
        """The limits from now on; allowances start full."""
        self.limits = limits
        by_name = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        self._buckets = {name: Bucket(limit, self._clock) for name, limit in by_name.items() if limit is not None}

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, while the block runs. Raises ApiError (429), with the time after which there is room again."""
        try:
            self._check()
        except ApiError:
            self.num_refused += 1
            raise
        if "requests" in self._buckets:
            self._buckets["requests"].take(1)
        self.num_requests += 1
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    def spend(self, num_tokens: int) -> None:
        """Count tokens of a prompt or an answer."""
        if "tokens" in self._buckets:
            self._buckets["tokens"].take(num_tokens)

    def headers(self) -> Headers:
        """What is left, in OpenAI's headers."""
        headers: Headers = []
        for name, bucket in self._buckets.items():
            values = {
                "limit": str(bucket.per_minute),
                "remaining": str(max(0, math.floor(bucket.level))),
                "reset": f"{bucket.seconds_until(bucket.per_minute):.3f}s",
            }
            headers += [(_header(kind, name), value.encode()) for kind, value in values.items()]
        return headers

    def _check(self) -> None:
        limit = self.limits.max_concurrent
        if limit is not None and self.num_running >= limit:
            raise _too_many(f"{limit} requests of this key at once", _CONCURRENT_RETRY_S)
        for name, bucket in self._buckets.items():
            if bucket.level < 1:
                retry_s = math.ceil(bucket.seconds_until(1))
                raise _too_many(f"{bucket.per_minute} {name} a minute of this key", retry_s)


class KeyAccounts:
    """An account for each key that was ever used, by its name, and one for requests that need no key."""

    def __init__(self) -> None:
        self._accounts: dict[str, KeyAccount] = {}
        self.of_nobody = KeyAccount("", KeyLimits())

    def of(self, key: ApiKey) -> KeyAccount:
        """The account of a key; what it has used stays when its limits change."""
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = KeyAccount(key.name, key.limits)
        elif account.limits != key.limits:
            account.set_limits(key.limits)
        return account

    def all(self) -> list[KeyAccount]:
        """Those of keys."""
        return list(self._accounts.values())


def _too_many(limit: str, retry_after_s: int) -> ApiError:
    message = f"rate limit reached: {limit}; try again in {retry_after_s} s"
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)
