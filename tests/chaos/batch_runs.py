"""Batch jobs under test as processes: rows of all forms, drivers that are killed, and what they kill is found again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.chaos.serving import MODEL, arguments
from tests.serving import ROOT, until

_WORDS = ["stage", "shard", "rank", "lane", "block", "cache", "ray", "node", "gang", "epoch", "step", "token"]
BROKEN = 10  # ways in which one row in 50 is broken


def rows(count: int, seed: int = 0) -> Iterator[str]:
    """Lines of an input: chats and completions, OpenAI's form and plain, one in 50 broken."""
    rng = random.Random(seed)
    for number in range(count):
        if number % 50 == 49:
            yield _broken(number // 50 % BROKEN, number)
            continue
        text = " ".join(rng.choices(_WORDS, k=rng.randint(2, 30)))
        limit = rng.randint(2, 40)
        if number % 3 == 0:
            yield json.dumps(_chat(number, content=f"What is a {text}?", max_tokens=limit))
        elif number % 3 == 1:
            temperature = rng.choice([0, 1, 1.3])
            yield json.dumps({"prompt": text, "max_tokens": limit, "temperature": temperature, "stop": ["rank."]})
        else:
            # no log-probabilities: their last digits depend on what a step computes beside
            messages = [{"role": "user", "content": text}]
            yield json.dumps({"messages": messages, "max_tokens": limit, "n": rng.choice([1, 1, 2])})


def _chat(number: int, content: str = "x", **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def _broken(way: int, number: int) -> str:
    chat = _chat(number)
    ways: list[Any] = [
        {**chat, "url": "/v1/embeddings"},
        _chat(number, temperature=9),
        _chat(number, stream=True),
        _chat(number, model="another"),
        _chat(number, bananas=1),
        _chat(number, max_tokens=10**6),
        _chat(number, logit_bias={"9999999": 1}),
        {"custom_id": f"c{number}"},
        "only a text",
    ]
    return json.dumps(ways[way]) if way < len(ways) else f'{{"custom_id": "c{number}", '


@dataclass
class Bench:
    """A config and an input in a folder, and drivers over them."""

    folder: Path
    address: str | None = None  # of the Ray cluster; None: each driver starts its own

    def write(self, count: int, layout: tuple[int, int] = (2, 1), **groups: dict[str, Any]) -> None:
        """The input and the config."""
        (self.folder / "in.jsonl").write_text("".join(line + "\n" for line in rows(count)))
        args = arguments(layout, batch={"gangs": 1}, **groups)
        application = {"name": "x", "import_path": "deployments.app:build_app", "args": args}
        (self.folder / "config.yaml").write_text(yaml.safe_dump({"applications": [application]}))

    def command(self, output: str, *more: str) -> list[str]:
        """What starts a driver, but for the interpreter."""
        where = ["--input", str(self.folder / "in.jsonl"), "--output", str(self.folder / output)]
        asked = ["--date", "2026-02-03", "--part-rows", "16", "--json", *more]
        return ["-m", "deployments.batch", str(self.folder / "config.yaml"), *where, *asked]

    def start(self, output: str) -> subprocess.Popen[str]:
        """A driver."""
        environment = dict(os.environ) if self.address is None else {**os.environ, "RAY_ADDRESS": self.address}
        return subprocess.Popen(
            [sys.executable, *self.command(output)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log").open("a"),
            text=True,
        )

    def finish(self, driver: subprocess.Popen[str]) -> dict[str, Any]:
        """The summary of a driver that ends well."""
        told, _ = driver.communicate()
        assert driver.returncode == 0, (self.folder / "log").read_text()[-3000:]
        summary: dict[str, Any] = json.loads(told)
        return summary

    def saved(self, output: str) -> set[str]:
        """Files in which ended rows are kept."""
        folder = self.folder / f"{output}.parts"
        return {path.name for path in folder.glob("*.jsonl")} if folder.is_dir() else set()

    def wait_for_more(self, output: str, driver: subprocess.Popen[str]) -> bool:
        """Wait until more ended rows are kept than now, or the driver has ended → whether it still runs."""
        before = self.saved(output)
        until(lambda: self.saved(output) - before or driver.poll() is not None)
        return driver.poll() is None

    def num_kept(self, output: str) -> int:
        """Ended rows that would not be computed again, if all were killed now."""
        in_parts, in_journals = 0, set()
        for path in (self.folder / f"{output}.parts").glob("*.jsonl"):
            try:
                lines = path.read_bytes().splitlines()
            except FileNotFoundError:  # it has just been removed
                continue
            if path.name.startswith("part-"):
                in_parts += json.loads(lines[0])["rows"]
            else:
                in_journals |= {json.loads(line)["number"] for line in lines}
        return in_parts + len(in_journals)

    def files(self, output: str) -> tuple[bytes, bytes]:
        """The answers and the error rows."""
        path = self.folder / output
        return path.read_bytes(), path.with_suffix(".errors.jsonl").read_bytes()


def processes(name: str) -> list[psutil.Process]:
    """Ray's processes below this one whose title has `name` in it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(name in word for word in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(process: psutil.Process | subprocess.Popen[str]) -> None:
    """SIGKILL; fine if it has just ended."""
    try:
        process.send_signal(signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
    if isinstance(process, subprocess.Popen):
        process.wait()


def pause(rng: random.Random, most_s: float) -> None:
    """A random time."""
    time.sleep(rng.uniform(0, most_s))
