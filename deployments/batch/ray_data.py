"""A model for Ray Data's `map_batches`: a callable class; each actor hosts a gang in a placement group of its own."""

import asyncio
import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from actors.tensors.backends.choose import placed_on
from cluster.placement.nodes import read_nodes
from cluster.placement.placement import resolve_device
from cluster.topology import Topology
from configs.files import read_config
from deployments.api.bodies import ChatBody, CompletionBody
from deployments.api.errors import ApiError
from deployments.api.responses import Stamp
from deployments.api.strict_body import parse_body
from deployments.batch.host import RowAnswerer, answerer_on
from deployments.batch.order import Order, shape_of
from deployments.batch.rows import Outcome, Row
from deployments.gangs import check_model, reserved
from deployments.hosting import GangHost

RequestOf = Callable[[dict[str, Any]], dict[str, Any]]


class BatchModel:
    """Answers rows of a dataset. The constructor returns when the gang serves. Calls may overlap: so it is fuller."""

    def __init__(self, config: str, request: RequestOf) -> None:
        """`config` is a Serve config file, which every node can read.

        `request` makes the fields of a request of a row's columns, as /v1/completions (with `prompt`) or
        /v1/chat/completions (with `messages`) take them. `model` may be left out. Rows without a `seed` get one that
        follows from their fields. Raises ValueError where the config or the model is wrong.
        """
        read = read_config(config)
        topology = Topology(read.parallel.tensor_parallel_size, read.parallel.pipeline_parallel_size)
        check_model(read, topology)
        device = resolve_device(placed_on(read.device), read_nodes())
        self._model, self._request = read.served_name, request
        with contextlib.ExitStack() as stack:
            placement = stack.enter_context(reserved(read, topology, device))
            self._host = GangHost(read, device, placement, "ray.data")
            stack.callback(self._host.close)
            self._stack = stack.pop_all()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        self._answerer: RowAnswerer | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="batch", daemon=True).start()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Columns of a batch → the same, and `answer` (text), `response` (JSON, as over HTTP) and `error` (a message).

        Of a row that cannot be answered, `answer` is None and `error` says why; of others `error` is None. Raises
        RuntimeError when the gang cannot come back.
        """
        columns = dict(batch)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        found = asyncio.run_coroutine_threadsafe(self._answer(rows), self._loop).result()
        bodies = [msgspec.json.decode(outcome.body) for outcome in found]
        columns["answer"] = [_text(body) for body in bodies]
        columns["response"] = [outcome.body.decode() for outcome in found]
        columns["error"] = [body["error"]["message"] if "error" in body else None for body in bodies]
        return columns

    def __del__(self) -> None:
        """Called at the end of the actor: give everything back."""
        if hasattr(self, "_stack"):
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._stack.close()

    async def _answer(self, rows: list[dict[str, Any]]) -> list[Outcome]:
        """The outcomes, in the order of the rows."""
        if self._answerer is None:
            self._answerer = answerer_on(self._host)
            self._pump = asyncio.create_task(self._pass_on(self._answerer))
        futures, asked = [], dict[int, Row]()
        for fields in rows:
            number, future = next(self._numbers), self._loop.create_future()
            futures.append(future)
            try:
                asked[number] = self._row(number, self._request(fields))
                self._waiting[number] = future
            except ApiError as error:
                future.set_result(Outcome(number, error.status, error.body()))
        order = Order(self._host.plan.scheduler.max_num_seqs)
        order.add(shape_of(row.number, row.body, self._host.plan.max_model_len) for row in asked.values())
        self._answerer.add([asked[number] for number in order.take(0, len(asked))])
        return list(await asyncio.gather(*futures))

    async def _pass_on(self, answerer: RowAnswerer) -> None:
        """Hand every outcome to who waits for it."""
        try:
            while True:
                for outcome in (await answerer.turn([], has_more=False)).outcomes:
                    self._waiting.pop(outcome.number).set_result(outcome)
        except RuntimeError as lost:
            for future in self._waiting.values():
                future.set_exception(lost)

    def _row(self, number: int, fields: dict[str, Any]) -> Row:
        raw = msgspec.json.encode({"model": self._model, **fields})
        body = parse_body(raw, CompletionBody if "prompt" in fields else ChatBody)
        if body.seed is None:
            seed = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") >> 1
            body = body.model_copy(update={"seed": seed})
        return Row(number, "", body, Stamp(hashlib.sha256(raw).hexdigest()[:32], int(time.time())), len(raw))


def _text(body: dict[str, Any]) -> str | None:
    if "error" in body:
        return None
    choice = body["choices"][0]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text
