"""A job: reads rows, has them answered, and writes part after part; each row ends once, however often it is started."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deployments.api.errors import ApiError, internal_error, log_unexpected
from deployments.batch.identity import Identity
from deployments.batch.journal import Ended, Journal
from deployments.batch.lease import Lease
from deployments.batch.lines import Line
from deployments.batch.manifest import Done, agree_on_length, write_done
from deployments.batch.parts import PartHead, encode_part, part_name, read_head, read_part
from deployments.batch.row_forms import custom_id_of, original, read_row
from deployments.batch.rows import Answerer, Row, Tally
from deployments.batch.source import Source
from deployments.batch.store import Store

logger = logging.getLogger(__name__)

_READERS = 16  # parts whose heads are read at once: an object store takes its time for each


@dataclass
class _Filling:
    """A part some of whose rows have not ended."""

    rows: range
    pulled: dict[int, tuple[str, Line]] = field(default_factory=dict)  # custom_id and row, until it ends
    results: dict[int, bytes] = field(default_factory=dict)  # lines by row
    errors: dict[int, bytes] = field(default_factory=dict)


class Job:
    """One run of a job, by the driver that holds the lease. `run` is used in one thread, `save` in any."""

    def __init__(
        self, store: Store, source: Source, identity: Identity, lease: Lease, model: str, max_row_bytes: int
    ) -> None:
        """`source` has been surveyed; `model`: what rows ask for that name none. Reads which parts are there."""
        self._store, self._source, self._identity, self._lease = store, source, identity, lease
        self._model, self._max_row_bytes = model, max_row_bytes
        self._lock = threading.RLock()
        self._heads = self._read_heads()
        self._filling: dict[int, _Filling] = {}
        self._journal = Journal(store, lease.number)
        self._journaled = self._journal.load(lambda number: self._part_of(number) not in self._heads)
        num_in_parts = sum(head.rows for head in self._heads.values())
        self.tally = Tally(source.num_rows, skipped=num_in_parts + len(self._journaled))

    @property
    def is_computed(self) -> bool:
        """Whether every part is written."""
        return len(self._heads) == self._source.num_parts

    def run(self, answerer: Answerer) -> None:
        """Have every row answered that is in no part. Raises ValueError where that cannot go on: what is done stays."""
        with contextlib.closing(answerer.run(self._rows())) as outcomes:
            try:
                for outcome in outcomes:
                    with self._lock:
                        self._end(outcome.number, outcome.status, outcome.body)
                        if self._journal.is_due:
                            self._lease.check()
                            self._journal.save()
            finally:
                self.save()
        assert self.is_computed, "every row that was pulled has had an outcome"

    def save(self) -> None:
        """Write down what has ended. A failure loses work, no row: it is logged."""
        try:
            with self._lock:
                self._lease.check()
                self._journal.save()
        except (ValueError, OSError) as error:
            logger.warning("what ended last is computed again: %s", error)

    def agree_on_length(self, max_model_len: int) -> int:
        """See manifest."""
        return agree_on_length(self._store, max_model_len)

    def publish(self, output: str, errors: str) -> Done:
        """Write the files that the job ends with. Raises ValueError where another file is in the way."""
        self._lease.check()
        self._store.publish(errors, lambda: self._lines(1))
        self._store.publish(output, lambda: self._lines(0))
        heads = self._heads.values()
        done = Done(self._source.num_rows, sum(one.completed for one in heads), sum(one.failed for one in heads))
        write_done(self._store, done)
        return done

    def _lines(self, at: int) -> Iterator[bytes]:
        """What OUT (0) or ERR (1) holds. Raises ValueError, before its end, where another driver has taken over."""
        try:
            for part in range(self._source.num_parts):
                yield read_part(self._store, part)[at]
        except ValueError:
            self._lease.check()  # who has taken over removes parts: that is then what has happened
            raise
        self._lease.check()

    def _read_heads(self) -> dict[int, PartHead]:
        """The heads of the parts that are there. One that is torn, by a store that shows such, is removed."""
        sizes = self._store.sizes()
        there = [part for part in range(self._source.num_parts) if part_name(part) in sizes]
        with ThreadPoolExecutor(_READERS) as pool:
            heads = pool.map(lambda part: read_head(self._store, part, sizes[part_name(part)]), there)
            found = dict(zip(there, heads, strict=True))
        for part, head in found.items():
            if head is None:
                logger.warning("%s/%s is not whole: it is made again", self._store.folder, part_name(part))
                self._store.remove(part_name(part))
        return {part: head for part, head in found.items() if head is not None}

    def _rows(self) -> Iterator[Row]:
        """The rows to answer. Those that cannot be, and those of the journal, end here."""
        for part in range(self._source.num_parts):
            if part in self._heads:
                continue
            with self._lock:
                filling = self._filling[part] = _Filling(self._source.rows_of(part))
            for line in self._source.part(part):
                row = self._admit(filling, line)
                if row is not None:
                    yield row

    def _admit(self, filling: _Filling, line: Line) -> Row | None:
        """The row in a line; None where it has ended already."""
        with self._lock:
            ended = self._journaled.pop(line.number, None)
            if ended is not None:
                self._put(filling, ended)
                return None
            custom_id = custom_id_of(line)
            filling.pulled[line.number] = custom_id, line
            try:
                return read_row(line, custom_id, self._model, self._identity, self._max_row_bytes)
            except ApiError as error:
                self._end(line.number, error.status, error.body())
            except Exception as error:  # noqa: BLE001 - a fault in one row ends that row only
                log_unexpected(error)
                self._end(line.number, 500, internal_error().body())
            return None

    def _end(self, number: int, status: int, body: bytes) -> None:
        """A row has ended."""
        filling = self._filling[self._part_of(number)]
        custom_id, line = filling.pulled.pop(number)
        is_error = status != 200
        answer: dict[str, Any] = {
            "id": f"batch_req_{self._identity.name('batch', number, custom_id)}",
            "custom_id": custom_id,
            "response": {
                "status_code": status,
                "request_id": f"req_{self._identity.name('request', number, custom_id)}",
                "body": msgspec.Raw(body),
            },
            "error": None,
        }
        if is_error:
            answer |= {name: value for name, value in original(line).items() if name != "custom_id"}
            self.tally.failed += 1
        else:
            self.tally.completed += 1
        ended = Ended(number, is_error, msgspec.Raw(msgspec.json.encode(answer)))
        self._journal.add(ended)
        self._put(filling, ended)

    def _put(self, filling: _Filling, ended: Ended) -> None:
        """Add the line of an ended row to its part, and write that when it is whole."""
        lines = filling.errors if ended.is_error else filling.results
        lines[ended.number] = bytes(ended.line) + b"\n"
        if len(filling.results) + len(filling.errors) < len(filling.rows):
            return
        part = self._part_of(filling.rows.start)
        head, data = encode_part(filling.rows, filling.results, filling.errors)
        self._lease.check()
        if not self._store.create(part_name(part), data):  # by one that had lost the lease, and did not know it yet
            head = read_head(self._store, part, self._store.sizes()[part_name(part)]) or head
        self._heads[part] = head
        del self._filling[part]
        self._journal.in_parts(filling.rows)

    def _part_of(self, number: int) -> int:
        return number // self._source.part_rows
