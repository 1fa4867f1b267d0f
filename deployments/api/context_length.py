"""The context's length: what a request that exceeds it is told, in the words that clients look for.

LiteLLM, pi, opencode, Cline and others shorten the conversation, or take another model, when they find these words or
the code in an error. LangChain looks for the code too, but in the message alone: openai-python shows it no more.
"""

from deployments.api.bodies import GenerationBody
from deployments.api.errors import ApiError


def too_long(max_model_len: int, num_prompt_tokens: int, num_asked: int, prompt_field: str, field: str) -> ApiError:
    """400: prompt and answer do not fit. `field`: the one that is at fault, which may be `prompt_field` itself."""
    total, rest = num_prompt_tokens + num_asked, max_model_len - num_prompt_tokens
    remedy = "" if field == prompt_field else f", or send at most {rest} as {field}"
    problem = (
        f"you requested {num_asked} output tokens and your prompt contains at least "
        f"{num_prompt_tokens} input tokens, for a total of at least {total} tokens. "
        f"Please reduce the length of the {prompt_field}{remedy}."
    )
    return _error(400, max_model_len, problem, field)


def conversation_too_long(max_model_len: int, reason: str, field: str) -> ApiError:
    """400: the conversation is too long to be rendered."""
    return _error(400, max_model_len, f"{reason}.", field)


def body_too_long(max_model_len: int, max_bytes: int) -> ApiError:
    """413: the body has more bytes than a context's text takes."""
    problem = (
        f"the body is larger than {max_bytes} bytes. Please reduce the length of the prompt, or raise "
        "admission.max_body_bytes."
    )
    return _error(413, max_model_len, problem, None)


def truncated(body: GenerationBody, prompt_ids: list[int], max_model_len: int) -> list[int]:
    """As much of a prompt as is to be read: its end, or its beginning."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return prompt_ids
    if limit == -1:
        asked = body.token_limit[1]
        limit = max(1, max_model_len - (1 if asked is None else asked))
    return prompt_ids[-limit:] if body.truncation_side == "left" else prompt_ids[:limit]


def _error(status: int, max_model_len: int, problem: str, field: str | None) -> ApiError:
    beginning = f"This model's maximum context length is {max_model_len} tokens. However, "
    message = f"{beginning}{problem} (context_length_exceeded)"
    return ApiError(status, message, param=field, code="context_length_exceeded")
