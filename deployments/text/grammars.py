"""Grammars of one model: from what a request asks of its answer to the text that ranks follow, or why there is none."""

from dataclasses import replace
from functools import partial
from typing import Any

from deployments.text.answer_grammar import Thinking, answer_grammar
from deployments.text.call_forms import CallForm
from deployments.text.grammar_compiler import GrammarCompiler
from deployments.text.grammar_text import GrammarError, Marks
from deployments.text.prompts import ContentRule, Conversation, Prompt
from deployments.text.response_format import ResponseFormat
from deployments.text.response_reader import ResponseReader
from deployments.text.tool_calls import CallIds


class Grammars:
    """Used in the event loop's thread. Its processes start with the first grammar."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        """`tokenizer` is one of Transformers'; `ends`: the ids that end an answer."""
        self._marks = Marks.of(tokenizer, ends)
        highest = max([len(tokenizer) - 1, *ends, *self._marks.ids.values()])
        self._compiler = GrammarCompiler(self._marks, max(highest + 1, 257 + len(self._marks.ids) + len(ends)))

    async def of(
        self, content: ContentRule | None, prompt: Prompt, answer_format: ResponseFormat | None, prefix: str
    ) -> str:
        """What an answer to the prompt is held to: content that is asked for, calls that are held, or either.

        `prefix`: what the prompt has of the answer already. Raises GrammarError where it cannot be made sure of,
        and GrammarBusy.
        """
        conversation = prompt if isinstance(prompt, Conversation) else Conversation([])
        if conversation.continues_message:
            message = "the whole answer is held to a schema, a grammar or calls, so it cannot be begun; leave it out"
            raise GrammarError(message, "continue_final_message")
        if conversation is not prompt:  # of a plain prompt the answer is plain text, whatever the model's format
            answer_format = None
        form, thinking = _form(answer_format, prefix), _thinking(answer_format, prefix)
        make = partial(answer_grammar, content, conversation, form, thinking, self._marks)
        try:
            return await self._compiler.compile(await self._compiler.made(make))
        except GrammarError:
            calls = [tool["function"]["name"] for tool in conversation.tools]
            if conversation.call_rule.strict.issuperset(calls):
                raise
        # one bad schema of a tool that is not strict fails none: its arguments are any then
        return await self._compiler.compile(await self._compiler.made(partial(make, is_loose=True)))

    def close(self) -> None:
        """End the processes. May be called twice."""
        self._compiler.close()


def _form(answer_format: ResponseFormat | None, prefix: str) -> CallForm | None:
    """How calls and content are written, without the marks before content that the prompt has already."""
    form = None if answer_format is None else answer_format.form
    if form is None or not form.content[0] or not prefix.endswith(form.content[0]):
        return form
    return replace(form, content=("", form.content[1]))


def _thinking(answer_format: ResponseFormat | None, prefix: str) -> Thinking | None:
    """What the prompt leaves of the model's thinking: it may have opened it, or closed it."""
    if answer_format is None or answer_format.thought is None or not answer_format.has_thinking:
        return None
    opens, closes = answer_format.thought
    if ResponseReader(answer_format, prefix, {}, CallIds(None, "", 0)).is_thinking:
        return Thinking("", closes)
    return None if closes in prefix else Thinking(opens, closes)
