"""A model for Ray Data's `map_batches`: a callable class; each actor hosts a gang in a placement group of its own."""

import contextlib
import hashlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError

from actors.tensors.backends.choose import placed_on
from cluster.placement.nodes import read_nodes
from cluster.placement.placement import resolve_device
from cluster.topology import Topology
from configs.files import read_config
from deployments.api.bodies import ChatBody, CompletionBody
from deployments.api.errors import ApiError
from deployments.api.responses import Stamp
from deployments.api.strict_body import parse_body
from deployments.batch.host import MAX_VAIN, start_host
from deployments.batch.order import UNLIMITED, Order, shape_of
from deployments.batch.rows import Outcome, Row
from deployments.gangs import check_model, reserved

logger = logging.getLogger(__name__)

RequestOf = Callable[[dict[str, Any]], dict[str, Any]]


class BatchModel:
    """Answers rows of a dataset. The constructor returns when the gang serves. Calls may overlap: so it is fuller."""

    def __init__(self, config: str, request: RequestOf) -> None:
        """`config` is a Serve config file, which every node can read.

        `request` makes the fields of a request of a row's columns, as /v1/completions (with `prompt`) or
        /v1/chat/completions (with `messages`) take them. `model` may be left out. Rows without a `seed` get one that
        follows from their fields. Raises ValueError where the config or the model is wrong.
        """
        self._request = request
        self._gang = _Gang(config)
        weakref.finalize(self, self._gang.close)  # at the end of the actor, if not before

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Columns of a batch → the same, and `answer` (text), `response` (JSON, as over HTTP) and `error` (a message).

        Of a row that cannot be answered, `answer` is None and `error` says why; of others `error` is None. Raises
        RayError when the gang cannot come back.
        """
        columns = dict(batch)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        found = self._gang.answer([self._request(row) for row in rows])
        bodies = [msgspec.json.decode(outcome.body) for outcome in found]
        columns["answer"] = [_text(body) for body in bodies]
        columns["response"] = [outcome.body.decode() for outcome in found]
        columns["error"] = [body["error"]["message"] if "error" in body else None for body in bodies]
        return columns


class _Gang:
    """A gang with its reservation. Its host is another process: an actor whose ranks run cannot end by itself."""

    def __init__(self, config_file: str) -> None:
        self._config = config = read_config(config_file)
        topology = Topology(config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size)
        check_model(config, topology)
        self._device = resolve_device(placed_on(config.device), read_nodes())
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[Row, Future[Outcome]]] = {}
        self._lock = threading.Lock()
        self._has_rows = threading.Event()
        self._is_closed = False
        with contextlib.ExitStack() as stack:
            self._placement = stack.enter_context(reserved(config, topology, self._device))
            self._host = self._start()
            self._held = stack.pop_all()
        threading.Thread(target=self._pass_on, name="batch", daemon=True).start()

    def answer(self, requests: list[dict[str, Any]]) -> list[Outcome]:
        """The outcomes, in the order of the requests. Any thread may call it.

        Raises TypeError, before anything is sent, for a field that is not made of JSON's types (such as NumPy's).
        """
        futures, rows, waiting = [], dict[int, Row](), dict[int, tuple[Row, Future[Outcome]]]()
        for fields in requests:
            number, future = next(self._numbers), Future[Outcome]()
            futures.append(future)
            try:
                rows[number] = self._row(number, fields)
            except ApiError as error:
                future.set_result(Outcome(number, error.status, error.body()))
                continue
            waiting[number] = rows[number], future
        order = Order(self._config.scheduler.max_num_seqs)
        longest = self._config.model.max_model_len or UNLIMITED
        order.add(shape_of(row.number, row.body, longest) for row in rows.values())
        with self._lock:
            self._waiting.update(waiting)
            self._host.add.remote([rows[number] for number in order.take(0, len(rows))])
        self._has_rows.set()
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the gang, and give back what is reserved."""
        self._is_closed = True
        self._has_rows.set()
        self._held.close()

    def _start(self) -> Any:
        host = start_host(self._config, self._placement)
        ray.get(host.start.remote(self._config, self._device, self._placement, 0, None))
        return host

    def _pass_on(self) -> None:
        """Hand every outcome to who waits for it; after the loss of a host, ask another one. In a thread."""
        num_lost = 0
        while self._has_rows.wait() and not self._is_closed:
            try:
                outcomes = ray.get(self._host.turn.remote([], False)).outcomes
                num_lost = 0 if outcomes else num_lost
                for outcome in outcomes:
                    if waiting := self._waiting.pop(outcome.number, None):  # else it was sent to two hosts
                        waiting[1].set_result(outcome)
            except RayError as error:
                num_lost += 1
                self._replace(error, num_lost)
            if not self._waiting:
                self._has_rows.clear()
                if self._waiting:  # they came meanwhile
                    self._has_rows.set()

    def _replace(self, error: RayError, num_lost: int) -> None:
        """Start another host, and send it what waits; those who wait are told where that does not help."""
        logger.error("the gang is lost: %s", error)
        try:
            if num_lost >= MAX_VAIN:
                raise error
            with self._lock:
                ray.kill(self._host)
                self._host = self._start()
                self._host.add.remote([row for row, _ in list(self._waiting.values())])
        except RayError as failure:
            for number in list(self._waiting):
                self._waiting.pop(number)[1].set_exception(failure)

    def _row(self, number: int, fields: dict[str, Any]) -> Row:
        raw = msgspec.json.encode({"model": self._config.served_name, **fields})
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
