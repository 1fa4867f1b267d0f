"""Request bodies: every field that clients are known to send, and for each whether it is used, ignored or refused.

A field that is not supported yet is an entry `name: only(neutral values)`; to support it, begin by giving it a type.
The fields of sampling are in sampling_fields.py, prompts and messages in prompt_fields.py.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from deployments.api.answer_fields import AnswerBody
from deployments.api.foreign_fields import OF_CHATS, OF_COMPLETIONS
from deployments.api.prompt_fields import Messages, Prompts
from deployments.api.sampling_fields import NumLogprobs
from deployments.api.strict_body import Body, only, wrong
from deployments.api.structured_fields import StructuredBody
from deployments.api.template_fields import TemplateBody
from deployments.api.tool_fields import INSTEAD_OF_FUNCTIONS
from deployments.text.prompts import Prompt

MAX_STOPS = 16  # OpenAI takes 4
MAX_STOP_CHARS = 1024
MAX_CHOICES = 128


class StreamOptions(Body):
    """`stream_options`: what a stream contains beside its text."""

    place: ClassVar[str] = "stream_options."
    include_usage: bool = False
    continuous_usage_stats: bool = False  # in every chunk, as it is then
    include_obfuscation: Annotated[object, only(False)] = None


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class GenerationBody(AnswerBody, StructuredBody):
    """The fields that completions and chats share."""

    default_max_tokens: ClassVar[int | None]  # None: what the context has left

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)  # answers to each prompt
    best_of: int | None = Field(default=None, ge=1)  # as many as are shown
    stop: Annotated[list[StopString], FailFast(), Field(max_length=MAX_STOPS), BeforeValidator(_one_or_many)] = Field(
        default_factory=list
    )
    ignore_eos: bool = False
    timeout: float | None = Field(default=None, gt=0)  # seconds from arrival to the end; LiteLLM's name
    stream: bool = False
    stream_options: StreamOptions | None = None

    # OpenAI's own fields that never change the answer
    user: object = None
    metadata: object = None
    store: object = None
    service_tier: object = None
    safety_identifier: object = None
    prompt_cache_key: object = None
    prompt_cache_retention: object = None

    # refused where they would mean something: sampling
    length_penalty: Annotated[object, only(1)] = None
    use_beam_search: Annotated[object, only(False)] = None
    repetition_detection: Annotated[object, only()] = None
    # where the answer ends
    thinking_token_budget: Annotated[object, only()] = None
    # the server's own affairs
    kv_transfer_params: Annotated[object, only()] = None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts; each gets `n` answers."""
        raise NotImplementedError

    @property
    def num_prompts(self) -> int:
        """How many they are; to make them takes longer."""
        return 1

    @property
    def prompt_field(self) -> str:
        """The name of the field that holds the prompts."""
        raise NotImplementedError

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the generated tokens, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def echoes(self) -> bool:
        """Whether the answer's text begins with the prompt."""
        return False

    @property
    def continues_prompt(self) -> bool:
        """Whether the answer's text goes on from the prompt's, or begins anew."""
        return True

    @property
    def lead(self) -> str:
        """Text that the answer shows first."""
        return ""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk of a stream says the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer's own are added to a prompt that is a text."""
        return True

    @model_validator(mode="after")
    def _all_answers_are_shown(self) -> Self:
        if self.best_of not in (None, self.n):
            raise wrong("unsupported_parameter", "must be as n: all answers are shown; send n alone", field="best_of")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_come_with_a_whole_answer(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise wrong(
                "invalid_value", 'come with "stream": false only; leave one of them out', field="prompt_logprobs"
            )
        return self

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("invalid_value", 'needs "stream": true; leave it out', field="stream_options")
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    foreign: ClassVar[Mapping[str, str]] = OF_COMPLETIONS
    default_max_tokens: ClassVar[int | None] = 16

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: NumLogprobs | None = None
    echo: bool = False

    add_special_tokens: bool = True

    suffix: Annotated[object, only("")] = None
    prompt_embeds: Annotated[object, only()] = None

    @property
    def prompts(self) -> list[Prompt]:
        """See GenerationBody."""
        return self.prompt

    @property
    def num_prompts(self) -> int:
        """See GenerationBody."""
        return len(self.prompt)

    @property
    def prompt_field(self) -> str:
        """See GenerationBody."""
        return "prompt"

    @property
    def echoes(self) -> bool:
        """See GenerationBody."""
        return self.echo

    @property
    def num_logprobs(self) -> int | None:
        """See SamplingBody."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As many as for the answer where the prompt is echoed, or as are asked for."""
        asked = [
            number for number in (self.prompt_logprobs, self.logprobs if self.echo else None) if number is not None
        ]
        return max(asked, default=None)

    @property
    def adds_special_tokens(self) -> bool:
        """See GenerationBody."""
        return self.add_special_tokens

    @model_validator(mode="after")
    def _something_is_shown(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise wrong("invalid_value", 'must be at least 1, or 0 with "echo": true', field="max_tokens")
        return self


class ChatBody(GenerationBody, TemplateBody):
    """POST /v1/chat/completions."""

    foreign: ClassVar[Mapping[str, str]] = OF_CHATS
    default_max_tokens: ClassVar[int | None] = None

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: NumLogprobs = 0
    include_reasoning: bool = True
    echo: bool = False

    prediction: object = None  # of what the answer will be: for speed alone

    functions: Annotated[object, only([], instead=INSTEAD_OF_FUNCTIONS)] = None
    verbosity: Annotated[object, only("medium")] = None
    modalities: Annotated[object, only(["text"])] = None
    audio: Annotated[object, only()] = None
    web_search_options: Annotated[object, only()] = None
    function_call: Annotated[object, only("none", "auto", instead=INSTEAD_OF_FUNCTIONS)] = None
    add_special_tokens: Annotated[object, only(False)] = None
    mm_processor_kwargs: Annotated[object, only({})] = None

    @property
    def prompts(self) -> list[Prompt]:
        """One conversation."""
        return [self.conversation_of(self.messages)]

    @property
    def answer_role(self) -> str:
        """The role of the answer's message: that of the message which it goes on with."""
        return self.messages[-1].role if self.continue_final_message else "assistant"

    @property
    def lead(self) -> str:
        """With `echo` the last message, where the answer is of the same role."""
        last = self.messages[-1]
        return "\n".join(last.texts) if self.echo and last.role == self.answer_role else ""

    @property
    def continues_prompt(self) -> bool:
        """See GenerationBody."""
        return self.continue_final_message

    @property
    def prompt_field(self) -> str:
        """See GenerationBody."""
        return "messages"

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """`max_completion_tokens`, or `max_tokens`, its older name."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """See SamplingBody."""
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong("invalid_value", 'needs "logprobs": true; send both', field="top_logprobs")
        return self

    @model_validator(mode="after")
    def _one_token_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("invalid_value", "contradicts max_completion_tokens; send only one of them", field="max_tokens")
        return self
