"""Kills the rank while streams run: how long they pause, and whether their words are those of an undisturbed run."""

import http.client
import itertools
import json
import os
import random
import signal
import threading
import time
from typing import NamedTuple

from deployments.bench.profile import cluster
from gpu_stages.server import NAME
from gpu_stages.stages import Job


class Stream(NamedTuple):
    words: str
    times_s: list[float]


def run(job: Job) -> None:
    count, num_tokens = (3, 48) if job.is_tiny else (8, 256)
    words = 100 if job.is_tiny else 1000
    prompts = [" ".join(f"w{random.Random(seed).randrange(words)}" for _ in range(20)) for seed in range(count)]
    alone, again = (streams(job.port, prompts, num_tokens) for _ in range(2))
    url = f"http://127.0.0.1:{job.port}"
    (rank,) = cluster(url)["ranks"]
    killed: list[int] = []

    def kill_in_the_middle(num_words: int) -> None:
        if num_words >= num_tokens // 4 and not killed:
            killed.append(rank["pid"])
            os.kill(rank["pid"], signal.SIGKILL)

    found = streams(job.port, prompts, num_tokens, kill_in_the_middle)
    if not killed:
        raise RuntimeError("the streams were over before the rank was killed")
    pauses = [max(after - before for before, after in itertools.pairwise(one.times_s)) for one in found]
    job.record(
        streams=count,
        longest_pause_s=max(pauses),
        shortest_pause_s=min(pauses),
        same_words=same(alone, found),
        same_words_without_a_kill=same(alone, again),
        epoch=cluster(url)["epoch"],
    )


def same(some: list[Stream], others: list[Stream]) -> int:
    return sum(one.words == other.words for one, other in zip(some, others, strict=True))


def streams(port: int, prompts: list[str], num_tokens: int, each_chunk=lambda num_words: None) -> list[Stream]:
    """The answers to some prompts at once; `each_chunk` is told how many words the first stream has."""
    found: dict[int, Stream] = {}

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": NAME, "prompt": prompts[number], "max_tokens": num_tokens, "temperature": 0,
                "ignore_eos": True, "stream": True}  # fmt: skip
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        words, times_s = [], []
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                words += [choice["text"] for choice in json.loads(line[6:])["choices"]]
                times_s.append(time.monotonic())
                if number == 0:
                    each_chunk(sum(text.count("w") for text in words))
        found[number] = Stream("".join(words), times_s)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < len(prompts):
        raise RuntimeError("a stream broke off")
    return [found[number] for number in range(len(prompts))]
