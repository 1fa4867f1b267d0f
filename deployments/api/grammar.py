"""The grammar of a request's answers: made of its fields and its prompt, or refused by the field that is at fault."""

import asyncio
import time

from actors.decisions.against_grammar import against_grammar
from actors.words.messages import Request
from deployments.api.bodies import GenerationBody
from deployments.api.errors import ApiError
from deployments.api.generation import too_late
from deployments.text.grammar_text import GrammarBusy, GrammarError
from deployments.text.prompts import Prompt
from deployments.text.tokenizer import Text

_RETRY_AFTER_S = 5
MAX_CHARS_OF_ANSWERS = 8 * 1024 * 1024  # every answer brings its own to every rank


async def grammar_of(
    body: GenerationBody, prompt: Prompt, prompt_ids: list[int], text: Text, deadline: float | None
) -> str | None:
    """What the answers are held to; None: to nothing. `deadline`: in monotonic seconds.

    Raises ApiError: 400 where they cannot be held to it, 503 where too many grammars are compiled, 504 at the deadline.
    """
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            return await text.grammar(body.content_rule, prompt, prompt_ids)
    except GrammarError as error:
        raise ApiError(400, str(error), param=error.field) from None
    except GrammarBusy:
        message = "too many schemas and grammars wait to be compiled; try again in a few seconds"
        raise ApiError(503, message, code="server_overloaded", retry_after_s=_RETRY_AFTER_S) from None
    except TimeoutError:
        raise too_late() from None


def check_contradictions(request: Request) -> None:
    """Raises ApiError (400) where another field of the request contradicts its grammar."""
    if field := against_grammar(request):
        message = f"{field}: contradicts what the answer is held to (a schema, a grammar, calls); leave it out"
        raise ApiError(400, message, param=field)


def check_size(num_chars: int, n: int) -> None:
    """Raises ApiError (400) where the grammars of all answers together are more than the ranks are sent at once."""
    if num_chars > MAX_CHARS_OF_ANSWERS:
        field = "n" if n > 1 else "prompt"
        message = (
            f"{field}: the schemas, grammars or calls that all these answers are held to take {num_chars} characters, "
            f"and at most {MAX_CHARS_OF_ANSWERS} are taken at once; ask for fewer answers, or make them smaller"
        )
        raise ApiError(400, message, param=field)
