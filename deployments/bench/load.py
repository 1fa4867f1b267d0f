"""What a load test sends, and when: random prompts, shared prefixes, or conversations of a file; Poisson arrivals."""

import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_WORDS = 4000  # of the text whose tokens tell which ids a tokenizer has


@dataclass(frozen=True)
class Ask:
    """One request: its path, and the fields of its body that are not the same in all requests."""

    path: str
    fields: dict[str, Any]
    prompt_tokens: int | None = None  # None: only the server can count them


class Workload(Protocol):
    """Where prompts come from."""

    def ask(self, level: int, index: int) -> Ask:
        """The request of this index in this level of a sweep; the same for the same seed."""
        ...

    def __str__(self) -> str:
        """A description for people."""
        ...


@dataclass(frozen=True)
class RandomPrompts:
    """Different random prompts of one length; with a shared prefix before them where `prefix_len` is set.

    As `vllm bench serve --dataset-name random`: the prefix comes on top of the input. They are token ids drawn from
    `ids`, or words where the server's ids are not known (then the lengths count words) or it only takes chats.
    """

    seed: int
    input_len: int
    prefix_len: int = 0
    num_prefixes: int = 1
    ids: Sequence[int] | None = None
    is_chat: bool = False

    def ask(self, level: int, index: int) -> Ask:
        """See Workload."""
        prefix = self._draw(f"prefix {index % self.num_prefixes}", self.prefix_len)
        drawn = prefix + self._draw(f"{level} {index}", self.input_len)
        if self.ids is not None:
            return Ask(COMPLETIONS, {"prompt": drawn}, len(drawn))
        text = " ".join(drawn)
        return Ask(CHAT, {"messages": [{"role": "user", "content": text}]}) if self.is_chat else _text(text)

    def _draw(self, name: str, count: int) -> list[Any]:
        rng = random.Random(f"{self.seed} {name}")  # noqa: S311 - load, no secrets
        return rng.choices(self.ids, k=count) if self.ids is not None else words(rng, count)

    def __str__(self) -> str:
        kind = "random words" if self.ids is None else "random token ids"
        shared = f", after one of {self.num_prefixes} shared prefixes of {self.prefix_len}" if self.prefix_len else ""
        return f"{self.input_len} {kind}{shared}"


@dataclass(frozen=True)
class Conversations:
    """Conversations of a file, in its order, and again from its start after the last."""

    path: str
    messages: Sequence[list[dict[str, Any]]]

    def ask(self, level: int, index: int) -> Ask:
        """See Workload."""
        return Ask(CHAT, {"messages": self.messages[index % len(self.messages)]})

    def __str__(self) -> str:
        return f"{len(self.messages)} conversations of {self.path}"


def read_conversations(path: Path) -> Conversations:
    """A JSONL file: on each line a list of chat messages, or an object with `messages`, in OpenAI's form.

    What follows the last message of the user is the answer of another model, and is left out.
    Raises ValueError by line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--conversations: {path} cannot be read ({error}); name a JSONL file") from None
    found = [_messages(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"--conversations: {path} is empty; put one conversation on each line")
    return Conversations(str(path), found)


def _messages(where: str, line: str) -> list[dict[str, Any]]:
    wanted = f'{where}: a line is a list of messages or an object with "messages", each with "role" and "content"'
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{wanted}; this one is no JSON ({error})") from None
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and "role" in one and "content" in one for one in messages
    ):
        raise ValueError(wanted)
    users = [index for index, one in enumerate(messages) if one["role"] == "user"]
    if not users:
        raise ValueError(f"{where}: no message of the user; there is nothing to answer")
    return messages[: users[-1] + 1]


def words(rng: random.Random, count: int) -> list[str]:
    """Made-up words of two to seven letters."""
    return ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(count)]


def sample_text() -> str:
    """Text of many different tokens: its ids, by a tokenizer, are what random prompts are drawn from."""
    return " ".join(words(random.Random(0), _WORDS))  # noqa: S311 - load, no secrets


def arrivals_s(rate: float, seed: int) -> Iterator[float]:
    """When requests of a Poisson process arrive, in seconds from its start: exponential gaps of 1 / rate on average."""
    rng, now = random.Random(f"{seed} arrivals {rate}"), 0.0  # noqa: S311 - load, no secrets
    while True:
        now += rng.expovariate(rate)
        yield now


def _text(text: str) -> Ask:
    return Ask(COMPLETIONS, {"prompt": text})
