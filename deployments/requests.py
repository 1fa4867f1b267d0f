"""Request bodies: every field that clients are known to send, and for each whether we take, pass or refuse it.

A field that is not supported yet is an entry `name: only(neutral values)`; supporting it begins by giving it a type.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, model_validator

from deployments.api_error import shown
from deployments.strict_body import Body, only, wrong

MAX_STOPS = 16  # OpenAI takes 4
MAX_STOP_CHARS = 1024
MAX_MESSAGES = 2048


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template: dicts with role, content and maybe name, all of them text."""

    messages: list[dict[str, str]]

    @property
    def num_chars(self) -> int:
        """Length of all contents together."""
        return sum(len(message["content"]) for message in self.messages)


Prompt = str | list[int] | Conversation


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool = False
    continuous_usage_stats: Annotated[object, only(False)] = None
    include_obfuscation: Annotated[object, only(False)] = None


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class GenerationBody(Body):
    """What both endpoints take."""

    default_max_tokens: ClassVar[int | None]  # None: what the context has left

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopString], FailFast(), Field(max_length=MAX_STOPS), BeforeValidator(_one_or_many)] = Field(
        default_factory=list
    )
    ignore_eos: bool = False
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
    n: Annotated[object, only(1)] = None
    best_of: Annotated[object, only(1)] = None
    top_p: Annotated[object, only(1)] = None
    top_k: Annotated[object, only(-1, 0)] = None
    min_p: Annotated[object, only(0)] = None
    presence_penalty: Annotated[object, only(0)] = None
    frequency_penalty: Annotated[object, only(0)] = None
    repetition_penalty: Annotated[object, only(1)] = None
    length_penalty: Annotated[object, only(1)] = None
    logit_bias: Annotated[object, only({})] = None
    bad_words: Annotated[object, only([])] = None
    allowed_token_ids: Annotated[object, only([])] = None
    use_beam_search: Annotated[object, only(False)] = None
    response_format: Annotated[object, only({"type": "text"})] = None
    structured_outputs: Annotated[object, only()] = None
    repetition_detection: Annotated[object, only()] = None
    # where it ends
    min_tokens: Annotated[object, only(0)] = None
    stop_token_ids: Annotated[object, only([])] = None
    include_stop_str_in_output: Annotated[object, only(False)] = None
    thinking_token_budget: Annotated[object, only()] = None
    # what is said about the tokens
    prompt_logprobs: Annotated[object, only()] = None
    skip_special_tokens: Annotated[object, only(True)] = None
    spaces_between_special_tokens: Annotated[object, only(True)] = None
    return_token_ids: Annotated[object, only(False)] = None
    return_tokens_as_token_ids: Annotated[object, only(False)] = None
    stream_interval: Annotated[object, only(1)] = None
    # how the prompt is read
    echo: Annotated[object, only(False)] = None
    truncate_prompt_tokens: Annotated[object, only()] = None
    truncation_side: Annotated[object, only()] = None
    # who comes first, and where the cache is
    priority: Annotated[object, only(0)] = None
    request_id: Annotated[object, only()] = None
    cache_salt: Annotated[object, only()] = None
    kv_transfer_params: Annotated[object, only()] = None

    @property
    def prompts(self) -> list[Prompt]:
        """One for each sequence asked for."""
        raise NotImplementedError

    @property
    def prompt_field(self) -> str:
        """The field that holds them."""
        raise NotImplementedError

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the generated tokens, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("invalid_value", 'needs "stream": true; leave it out', field="stream_options")
        return self


def _prompts(value: object) -> list[Prompt]:
    """A text, texts, ids or lists of ids, taken apart. Whether ids are in the vocabulary is seen later."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {str}:
            return list(value)
        if kinds == {list} and all(ids and set(map(type, ids)) == {int} for ids in value):
            return list(value)
    raise wrong("invalid_type", "must be a text, texts, token ids or lists of token ids, and not empty")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]

    logprobs: Annotated[object, only()] = None
    suffix: Annotated[object, only("")] = None
    add_special_tokens: Annotated[object, only(True)] = None
    prompt_embeds: Annotated[object, only()] = None

    @property
    def prompts(self) -> list[Prompt]:
        """As the client gave them."""
        return self.prompt

    @property
    def prompt_field(self) -> str:
        """See GenerationBody."""
        return "prompt"


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _textonly(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "text":
            raise wrong(
                "unsupported_parameter", "{kind} is not supported; send text parts only", kind=shown(data["type"])
            )
        return data


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise wrong("invalid_type", "must be a text or a list of text parts")


class Message(Body):
    """One turn. What answers of OpenAI carry beside role and content passes when it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(_parts)]
    name: str | None = None  # handed to the chat template

    refusal: Annotated[object, only()] = None
    audio: Annotated[object, only()] = None
    annotations: Annotated[object, only([])] = None
    function_call: Annotated[object, only()] = None
    tool_calls: Annotated[object, only([])] = None
    reasoning: Annotated[object, only("")] = None
    reasoning_content: Annotated[object, only("")] = None

    def for_template(self) -> dict[str, str]:
        """Text only; several parts are joined by line breaks."""
        message: dict[str, str] = {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    default_max_tokens: ClassVar[int | None] = None

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(default=None, ge=1)

    logprobs: Annotated[object, only(False)] = None
    top_logprobs: Annotated[object, only(0)] = None
    tools: Annotated[object, only([])] = None
    tool_choice: Annotated[object, only("none", "auto")] = None  # both mean nothing without tools
    parallel_tool_calls: Annotated[object, only(True, False)] = None
    functions: Annotated[object, only([])] = None
    reasoning_effort: Annotated[object, only()] = None
    include_reasoning: Annotated[object, only(True)] = None
    verbosity: Annotated[object, only()] = None
    modalities: Annotated[object, only(["text"])] = None
    audio: Annotated[object, only()] = None
    prediction: Annotated[object, only()] = None
    web_search_options: Annotated[object, only()] = None
    function_call: Annotated[object, only("none", "auto")] = None
    chat_template: Annotated[object, only()] = None
    chat_template_kwargs: Annotated[object, only({})] = None
    add_generation_prompt: Annotated[object, only(True)] = None
    continue_final_message: Annotated[object, only(False)] = None
    add_special_tokens: Annotated[object, only(False)] = None
    documents: Annotated[object, only([])] = None
    mm_processor_kwargs: Annotated[object, only({})] = None

    @property
    def prompts(self) -> list[Prompt]:
        """The conversation."""
        return [Conversation([message.for_template() for message in self.messages])]

    @property
    def prompt_field(self) -> str:
        """See GenerationBody."""
        return "messages"

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """`max_completion_tokens`, or its old name."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @model_validator(mode="after")
    def _one_token_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("invalid_value", "contradicts max_completion_tokens; send only one of them", field="max_tokens")
        return self
