"""Generation: the answers of one HTTP request, from the engine's events to pieces of text."""

from actors.remote.engine import Engine
from actors.words.errors import EngineStopped
from actors.words.messages import Event, Request
from deployments.api_error import ApiError, public_text
from deployments.outbox import Mailbox, Outbox
from deployments.responses import Piece, Usage
from deployments.transcript import Transcript

NOT_READY_RETRY_AFTER_S = 5


class Answer:
    """One sequence of a request on its way to text."""

    def __init__(self, index: int, request: Request, transcript: Transcript) -> None:
        self.index = index
        self.request = request
        self.transcript = transcript

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.transcript.finish_reason is not None


class Generation:
    """All answers of one HTTP request."""

    def __init__(self, engine: Engine, outbox: Outbox, answers: list[Answer]) -> None:
        self._engine = engine
        self._outbox = outbox
        self._answers = {answer.request.request_id: answer for answer in answers}
        self._mailbox = Mailbox()

    @property
    def num_answers(self) -> int:
        """How many sequences were asked for."""
        return len(self._answers)

    @property
    def is_finished(self) -> bool:
        """Whether all answers are complete."""
        return all(answer.is_finished for answer in self._answers.values())

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        num_prompt = sum(len(answer.request.prompt_ids) for answer in self._answers.values())
        num_generated = sum(answer.transcript.num_tokens for answer in self._answers.values())
        return Usage(num_prompt, num_generated, num_prompt + num_generated)

    def start(self) -> None:
        """Hand all requests to the engine. Raises ApiError (503) when it does not serve."""
        self._mailbox = self._outbox.open(list(self._answers))
        try:
            for answer in self._answers.values():
                self._engine.add(answer.request)
        except EngineStopped:
            raise not_ready() from None

    def end(self) -> None:
        """Make the engine drop what is not finished. May be called twice, and before `start`."""
        for request_id, answer in self._answers.items():
            self._outbox.close(request_id)
            if not answer.is_finished:
                self._engine.finish(request_id)

    async def take(self) -> list[Piece]:
        """Wait for news and return all of it, at most one piece an answer. Raises ApiError when the engine failed."""
        return [self._read(event) for event in await self._mailbox.take()]

    def _read(self, event: Event) -> Piece:
        answer = self._answers[event.request_id]
        if event.finish_reason in ("error", "abort"):
            reason = public_text(event.error or "the request was aborted")
            raise ApiError(500, f"the engine could not finish this request: {reason}", code="engine_failure")
        text = answer.transcript.push(event.token_ids, event.finish_reason)
        if answer.is_finished:
            self._outbox.close(event.request_id)
            if event.finish_reason is None:  # a stop string: the engine does not know
                self._engine.finish(event.request_id, at_token=answer.transcript.num_tokens)
        return Piece(answer.index, text, answer.transcript.finish_reason)


def not_ready() -> ApiError:
    """The gang does not serve: still starting, failed, or shutting down."""
    message = "the model is not being served at the moment; try again later"
    return ApiError(503, message, code="not_ready", retry_after_s=NOT_READY_RETRY_AFTER_S)
