"""Load for a server that cannot take it: streams that start whether others have ended or not, in a process of its own.

    python tests/overload.py URL MODEL SECONDS MAX_TOKENS KEY=REQUESTS_PER_S ...

A rate that ends in `c` is a number of clients instead, each of which begins anew when its stream has ended. The last
line printed is JSON: by key the TTFT of what was let in, the seconds of refusals, their Retry-After, and counts.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit


@dataclass
class Seen:
    """What the requests of one key met. Seconds."""

    ttft_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_done: int = 0
    others: dict[str, int] = field(default_factory=dict)  # by status or exception


class Load:
    """Streams against one server."""

    def __init__(self, url: str, model: str, max_tokens: int) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port
        body = {"model": model, "prompt": "one two", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        self._body = json.dumps({**body, "temperature": 0}).encode()
        self.health_s: list[float] = []

    async def open(self, key: str, rate: float, seconds: float, seen: Seen) -> None:
        """Requests of a key at random moments, `rate` a second."""
        ends, rng, tasks = time.monotonic() + seconds, random.Random(key), set()
        at = time.monotonic()
        while (at := at + rng.expovariate(rate)) < ends:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            task = asyncio.ensure_future(self.one(key, seen))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def closed(self, key: str, num_clients: int, seconds: float, seen: Seen) -> None:
        """Requests of a key by clients that wait for the end of each."""
        ends = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < ends:
                await self.one(key, seen)

        await asyncio.gather(*(client() for _ in range(num_clients)))

    async def one(self, key: str, seen: Seen) -> None:
        """One stream."""
        began = time.monotonic()
        try:
            await self._one(key, seen, began)
        except (OSError, EOFError) as error:
            seen.others[type(error).__name__] = seen.others.get(type(error).__name__, 0) + 1

    async def _one(self, key: str, seen: Seen, began: float) -> None:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(self._body)}\r\n\r\n"
            writer.write(head.encode() + self._body)
            headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status = headers.split()[1]
            if status in ("429", "503"):
                seen.refused_s.append(time.monotonic() - began)
                seen.retry_after_s.append(int(headers.partition("retry-after: ")[2].split()[0]))
                return
            if status != "200":
                seen.others[status] = seen.others.get(status, 0) + 1
                return
            has_begun = False
            async for line in reader:
                if line.startswith(b"data: {"):
                    seen.num_tokens += 1
                    if not has_begun:
                        seen.ttft_s.append(time.monotonic() - began)
                    has_begun = True
                seen.num_done += line.startswith(b"data: [DONE]")
        finally:
            writer.close()

    async def watch_health(self, seconds: float) -> None:
        """Ask /health five times a second."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection(*self._address)
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            status = (await reader.read()).split()[1]
            writer.close()
            assert status == b"200", status
            self.health_s.append(time.monotonic() - began)
            await asyncio.sleep(0.2)


async def main(url: str, model: str, seconds: float, max_tokens: int, rates: dict[str, str]) -> dict[str, object]:
    """Run all at once."""
    load, seen = Load(url, model, max_tokens), {key: Seen() for key in rates}
    work = [load.watch_health(seconds)]
    for key, rate in rates.items():
        if rate.endswith("c"):
            work.append(load.closed(key, int(rate[:-1]), seconds, seen[key]))
        else:
            work.append(load.open(key, float(rate), seconds, seen[key]))
    began = time.monotonic()
    await asyncio.gather(*work)
    found: dict[str, object] = {key: asdict(one) for key, one in seen.items()}
    return {"keys": found, "health_s": load.health_s, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    url, model, seconds, max_tokens, *rates = sys.argv[1:]
    given = dict(rate.split("=") for rate in rates)
    print(json.dumps(asyncio.run(main(url, model, float(seconds), int(max_tokens), given))))
