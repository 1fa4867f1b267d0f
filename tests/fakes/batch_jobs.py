"""Batch jobs as a command would run them, but for the gangs and the model: configs, rows, and drivers that may die."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.config import Config
from deployments.batch.driver import Asked, Summary, drive, prepare
from deployments.batch.places import default_errors, open_store
from tests.fakes.fake_answerer import FakeAnswerer

MODEL = "tiny"


def chat(number: int, **fields: Any) -> dict[str, Any]:
    """A row of OpenAI's batch format."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 4, **fields}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def some_rows(count: int) -> list[Any]:
    """Rows of all forms, one in five of them broken."""
    forms = [
        chat,
        lambda number: {"prompt": f"text {number}", "max_tokens": 4},
        lambda number: {"custom_id": f"p{number}", "messages": [{"role": "user", "content": f"hello {number}"}]},
        lambda number: chat(number, temperature=7),
        lambda number: {"prompt": [number, 2, 3], "n": 2, "seed": 5},
    ]
    return [forms[number % len(forms)](number) for number in range(count)]


@dataclass
class Desk:
    """A folder with a checkpoint, an input, and what jobs make of it."""

    folder: Path
    config: Config = field(init=False)

    def __post_init__(self) -> None:
        checkpoint = self.folder / "checkpoint"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        (checkpoint / "model.safetensors").touch()
        self.config = Config.model_validate({"model": {"source": str(checkpoint), "name": MODEL}})

    @property
    def input(self) -> Path:
        return self.folder / "in.jsonl"

    def write(self, rows: list[Any]) -> None:
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, output: str | Path = "out.jsonl", answerer: Any = None, store: Any = None, **asked: Any) -> Summary:
        """One run of the job. `store`: instead of that of the output."""
        output = str(output) if "://" in str(output) else str(self.folder / output)
        errors = asked.pop("errors", None) or default_errors(output)
        config = asked.pop("config", None) or self.config
        store = store or open_store(output, errors)
        asked = {"part_rows": 8, **asked}
        wanted = Asked(str(asked.pop("input", self.input)), output, errors, **asked)
        job = prepare(wanted, config, Path(self.config.model.source), store)

        @contextlib.contextmanager
        def answering(identity: Any, tally: Any, run: Any) -> Any:
            yield answerer or FakeAnswerer()

        return drive(job, answering)

    def results(self, output: str = "out.jsonl") -> tuple[bytes, bytes]:
        """The bytes of both files."""
        path = self.folder / output
        return path.read_bytes(), Path(default_errors(str(path))).read_bytes()

    def lines(self, output: str = "out.jsonl") -> tuple[list[Any], list[Any]]:
        """The rows of both files."""
        answers, errors = self.results(output)
        return [json.loads(line) for line in answers.splitlines()], [json.loads(line) for line in errors.splitlines()]
