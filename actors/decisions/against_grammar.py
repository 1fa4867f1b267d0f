"""What contradicts a grammar in the request that has it."""

from actors.words.messages import Request


def against_grammar(request: Request) -> str | None:
    """The first field, by its name in the API, by which the text could not end where its grammar does, or not go on.

    None where there is none, or no grammar.
    """
    sampling = request.sampling
    if sampling.grammar is None:
        return None
    contradictions = {
        "ignore_eos": not request.stop_token_ids,
        "min_tokens": sampling.min_tokens > 0,
        "allowed_token_ids": bool(sampling.allowed_ids),
        "bad_words": bool(sampling.bad_words),
    }
    return next((field for field, is_set in contradictions.items() if is_set), None)
