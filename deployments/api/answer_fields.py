"""Answer fields: how much of a prompt is read, and what an answer shows beside its text."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deployments.api.sampling_fields import NumLogprobs, SamplingBody
from deployments.api.strict_body import only, wrong


class AnswerBody(SamplingBody):
    """The fields of an answer that completions and chats share, and that change nothing of how tokens are drawn."""

    include_stop_str_in_output: bool = False  # the text of a stop id too
    skip_special_tokens: bool = True  # False: they are text
    return_token_ids: bool = False  # of prompt and answer
    return_tokens_as_token_ids: bool = False  # in log-probabilities: token_id:17 in place of a token's text
    prompt_logprobs: NumLogprobs | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, lt=2**31)  # -1: as many as fit beside the answer
    truncation_side: Literal["left", "right"] = "left"  # that is cut off
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None  # of the answer's id

    # Passed, because they change nothing: tokenizers here put no spaces there, and chunks are sent as tokens come
    spaces_between_special_tokens: object = None
    stream_interval: object = None

    detokenize: Annotated[object, only(True)] = None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See SamplingBody."""
        return self.prompt_logprobs

    @model_validator(mode="after")
    def _something_is_left_of_the_prompt(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise wrong("invalid_value", "must be at least 1, or -1", field="truncate_prompt_tokens")
        return self
