"""An Answerer without gangs: answers are computed by hand, and come in any order that the window allows."""

import hashlib
import random
from collections.abc import Callable, Generator, Iterator

from deployments.api.errors import ApiError
from deployments.api.response_objects import Usage
from deployments.api.responses import Piece, reply_to
from deployments.batch.rows import Outcome, Row
from deployments.text.token_text import TokenTexts


class FakeAnswerer:
    """Says of each row a digest of its prompt and its seed. Rows whose prompt is "nobody" fail, as a gang would say."""

    def __init__(self, window: int = 20, order: int = 0, before: Callable[[Row], None] = lambda row: None) -> None:
        """`window`: rows held at once; `order`: seeds the order of answers; `before` is called with each row."""
        self.window, self.order, self.before = window, random.Random(order), before
        self.answered: list[str] = []

    def run(self, rows: Iterator[Row]) -> Generator[Outcome, None, None]:
        """See Answerer."""
        held: dict[int, Row] = {}
        while True:
            while len(held) < self.window and (row := next(rows, None)) is not None:
                held[row.number] = row
            if not held:
                return
            number = min(held) if len(held) == 1 else self.order.choice([*held])
            if min(held) + self.window < number:
                number = min(held)
            row = held.pop(number)
            self.before(row)
            self.answered.append(row.custom_id)
            yield answer(row)


def answer(row: Row) -> Outcome:
    """What the fake says of a row."""
    if "nobody" in str(row.body.prompts):
        error = ApiError(404, "model: there is no such model here", param="model", code="model_not_found")
        return Outcome(row.number, error.status, error.body())
    said = hashlib.sha256(f"{row.body.prompts} {row.body.seed}".encode()).hexdigest()[:12]
    reply = reply_to(row.body, TokenTexts(str, str, False, []), row.stamp)
    pieces = [Piece(index, f"{said} {index}", "stop") for index in range(row.body.n)]
    return Outcome(row.number, 200, reply.whole(pieces, Usage(1, 2, 3)))
