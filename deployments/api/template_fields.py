"""Template fields: what a request says to the chat template beside messages."""

from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, model_validator

from deployments.api.prompt_fields import Message, Variables
from deployments.api.strict_body import Body, only, wrong
from deployments.api.tool_fields import AUTO, ToolChoice, Tools, chosen
from deployments.text.prompts import Conversation

MAX_DOCUMENTS = 256
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TemplateBody(Body):
    """What chats and /tokenize share."""

    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = AUTO
    parallel_tool_calls: bool = True
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: Variables = Field(default_factory=dict)
    documents: Annotated[list[dict[str, Any]], FailFast(), Field(max_length=MAX_DOCUMENTS)] = Field(
        default_factory=list
    )
    add_generation_prompt: bool | None = None  # none: true, unless the answer goes on with the last message
    continue_final_message: bool = False

    chat_template: Annotated[object, only()] = None

    def conversation_of(self, messages: list[Message]) -> Conversation:
        """The messages with what these fields say. With `tool_choice` none the model does not hear of the tools."""
        tools = [] if self.tool_choice.mode == "none" else self.tools
        return Conversation(
            [message.for_template() for message in messages],
            [tool.for_template() for tool in tools],
            self._variables,
            is_single_call=self.tool_choice.is_one or not self.parallel_tool_calls,
            call_rule=self.tool_choice.rule(tools),
            documents=self.documents,
            begins_answer=not self.continue_final_message and self.add_generation_prompt is not False,
            continues_message=self.continue_final_message,
        )

    @property
    def _variables(self) -> dict[str, Any]:
        """Of the chat template. Templates have other switches than OpenAI's effort: those follow it."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        thinks = self.reasoning_effort != "none"
        of_effort = {"reasoning_effort": self.reasoning_effort, "enable_thinking": thinks, "thinking": thinks}
        return {**of_effort, **self.chat_template_kwargs}

    @model_validator(mode="after")
    def _chosen_tools_are_there(self) -> Self:
        chosen(self.tool_choice, self.tools)
        return self

    @model_validator(mode="after")
    def _answers_begin_or_go_on(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            words = "contradicts continue_final_message; send only one of them as true"
            raise wrong("invalid_value", words, field="add_generation_prompt")
        return self
