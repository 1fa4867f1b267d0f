"""Template fields: what a request says to the chat template beside messages and tools."""

import dataclasses
from typing import Annotated, Any, Self

from pydantic import FailFast, Field, model_validator

from deployments.api.prompt_fields import Variables
from deployments.api.strict_body import Body, only, wrong
from deployments.text.prompts import Conversation

MAX_DOCUMENTS = 256


class TemplateBody(Body):
    """What chats and /tokenize share."""

    chat_template_kwargs: Variables = Field(default_factory=dict)
    documents: Annotated[list[dict[str, Any]], FailFast(), Field(max_length=MAX_DOCUMENTS)] = Field(
        default_factory=list
    )
    add_generation_prompt: bool | None = None  # none: true, unless the answer goes on with the last message
    continue_final_message: bool = False

    chat_template: Annotated[object, only()] = None

    def as_asked(self, conversation: Conversation) -> Conversation:
        """The conversation with what these fields say of it."""
        return dataclasses.replace(
            conversation,
            documents=self.documents,
            begins_answer=not self.continue_final_message and self.add_generation_prompt is not False,
            continues_message=self.continue_final_message,
        )

    @model_validator(mode="after")
    def _answers_begin_or_go_on(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            words = "contradicts continue_final_message; send only one of them as true"
            raise wrong("invalid_value", words, field="add_generation_prompt")
        return self
