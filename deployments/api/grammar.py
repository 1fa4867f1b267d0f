"""The grammar of a request's answers: made of its fields and its prompt, or refused by the field that is at fault."""

import asyncio
import time

from deployments.api.bodies import GenerationBody
from deployments.api.errors import ApiError
from deployments.api.generation import too_late
from deployments.text.grammar_text import GrammarBusy, GrammarError
from deployments.text.prompts import Prompt
from deployments.text.tokenizer import Text

_AGAINST = ("min_tokens", "allowed_token_ids", "bad_words")
_RETRY_AFTER_S = 5


async def grammar_of(
    body: GenerationBody, prompt: Prompt, prompt_ids: list[int], text: Text, deadline: float | None
) -> str | None:
    """What the answers are held to; None: to nothing. `deadline`: in monotonic seconds.

    Raises ApiError: 400 where they cannot be held to it, or another field contradicts it, 503 where too many grammars
    are compiled, 504 at the deadline.
    """
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            grammar = await text.grammar(body.content_rule, prompt, prompt_ids)
    except GrammarError as error:
        raise ApiError(400, str(error), param=error.field) from None
    except GrammarBusy:
        message = "too many schemas and grammars wait to be compiled; try again in a few seconds"
        raise ApiError(503, message, code="server_overloaded", retry_after_s=_RETRY_AFTER_S) from None
    except TimeoutError:
        raise too_late() from None
    if grammar is not None and (field := _contradicts(body)):
        message = f"{field}: contradicts what the answer is held to (a schema, a grammar, calls); leave it out"
        raise ApiError(400, message, param=field)
    return grammar


def _contradicts(body: GenerationBody) -> str | None:
    """The first field by which an answer could not end where its grammar does, or would have nothing to go on with."""
    if body.ignore_eos and not body.stop_token_ids:
        return "ignore_eos"
    return next((field for field in _AGAINST if getattr(body, field)), None)
