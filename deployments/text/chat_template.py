"""Renders a model's chat template in a process of its own that can be killed: conversations become text."""

import contextlib
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from deployments.text.limited_process import LimitedProcess
from deployments.text.prompts import Conversation, ConversationError, content_text, public_text
from deployments.text.tool_prompt import reads_tools, without_tools

CPU_S = 1.0  # processor time for one conversation
MEMORY_BYTES = 256 * 1024 * 1024  # beside what the process has when it starts
MAX_RENDERED_CHARS = 4 * 1024 * 1024
_WALL_S = 20.0  # to wait for an answer: the process may get no CPU, or be stopped
_ONE_WORD: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
_ASKS_FOR_NULL = re.compile(r"""content(?:['"]\])? is (?:not )?none""")  # others take null for a text, or fail on it

_READS_PARTS = re.compile(r"""\btype\b['"\]\s]*[=!]=|\btype['"]?\s+in\b|\.text\b|\[['"]text['"]\]""")  # else it may not
_PROBE = "zzzz"
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}
_AROUND: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {  # what has to stand before and behind a role
    "system": ([], _ONE_WORD),
    "developer": ([], _ONE_WORD),
    "assistant": (_ONE_WORD, []),
    "tool": ([*_ONE_WORD, {"role": "assistant", "content": "", "tool_calls": [_CALL]}], []),
}


class ChatTemplate:
    """Used by one thread at a time. The process starts with the first conversation, and anew after one that ends it."""

    def __init__(
        self,
        template: str,
        special_tokens: dict[str, Any],
        now: datetime | None = None,
        mark: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """`special_tokens`: name → text, as the tokenizer has them and templates use them.

        `now`: what templates are told that print a date; none: the time of each conversation. `mark` is applied to all
        that clients wrote, before the template reads it.
        """
        self._mark = mark
        own = {name: token for name, token in special_tokens.items() if isinstance(token, str | list)}
        self._own_variables = own.keys()
        self._max_chars = MAX_RENDERED_CHARS
        setup = {
            "template": template,
            "special_tokens": own,
            "now": None if now is None else now.isoformat(),
            "max_chars": self._max_chars,
        }
        self._template = template
        self._may_read_parts = _READS_PARTS.search(template) is not None
        self._read: dict[str, tuple[bool, bool]] = {}  # by role
        self._process = LimitedProcess(
            "template_process.py", setup, cpu_s=CPU_S, memory_bytes=MEMORY_BYTES, wall_s=_WALL_S
        )
        self._knows_developers = "developer" in template
        self.knows_tools = reads_tools(template)
        self._null = None if _ASKS_FOR_NULL.search(template) else ""

    def check(self) -> None:
        """Raises ValueError for a template that does not end; that it refuses a one-word message is no error."""
        with contextlib.suppress(ConversationError):
            if self._answer(_ONE_WORD) is None:
                raise ValueError(
                    f"the model's chat template needs more than {CPU_S:g} s of processor time for one word; "
                    "mend chat_template in the checkpoint's folder"
                )

    def generation_prompt(self) -> str:
        """What the template writes to begin an answer; empty where it writes nothing, or refuses a one-word message."""
        texts = [
            str((self._answer(_ONE_WORD, add_generation_prompt=asked) or {}).get("text", "")) for asked in (True, False)
        ]
        num_common = next((at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), None)
        return texts[0][min(map(len, texts)) if num_common is None else num_common :]

    def render(self, conversation: Conversation) -> str:
        """The text that the model reads. Raises ConversationError where there is none, or it takes too long."""
        for name in sorted(self._own_variables & conversation.variables.keys()):
            field = "chat_template_kwargs"
            raise ConversationError(f"{field}: {name} is the tokenizer's own; leave it out", field=field)
        if conversation.documents and "documents" not in self._template:
            message = "documents: the model's chat template reads none; write them into a message"
            raise ConversationError(message, field="documents")
        if not self.knows_tools:
            conversation = without_tools(conversation)
        messages = [self._as_known(message) for message in conversation.messages]
        if conversation.continues_message and not messages[-1]["content"]:
            raise ConversationError("messages: the last one has no text to go on with; give it content")
        written = (messages, conversation.tools, conversation.variables, conversation.documents)
        messages, tools, variables, documents = map(self._mark, written)
        begins, continues = conversation.begins_answer, conversation.continues_message
        answer = self._answer(messages, tools, variables, documents, begins, continues)
        if answer is None:
            raise _refused("rendering takes too long; send fewer or shorter messages")
        if "too_long" in answer:
            message = (
                f"messages: the chat template makes {answer['too_long']} characters of them; "
                f"send at most {self._max_chars}"
            )
            raise ConversationError(message, is_too_long=True)
        if "text" not in answer:
            raise _refused(public_text(answer["refused"]) if "refused" in answer else "it failed on them")
        return str(answer["text"])

    def _as_known(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in the words that the template knows."""
        if message["role"] == "developer" and not self._knows_developers:  # newer, and such a template would drop it
            message = {**message, "role": "system"}
        content = message.get("content")
        if content is None:
            return {**message, "content": self._null}
        reads_text, reads_parts = self._reads(message["role"])
        if isinstance(content, list) and not reads_parts:
            return {**message, "content": content_text(content)}
        if isinstance(content, str) and not reads_text:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _reads(self, role: str) -> tuple[bool, bool]:
        """Whether the template reads a text, and text parts, as the content of messages of this role; tried once."""
        if not self._may_read_parts:
            return True, False
        if role not in self._read:
            before, after = _AROUND.get(role, ([], []))
            answers = [
                self._answer([*before, {"role": role, "content": content}, *after])
                for content in (_PROBE, [{"type": "text", "text": _PROBE}])
            ]
            if None in answers:  # the process ended, which tells nothing of the template: it is tried again
                return True, False
            as_text, as_parts = (str((answer or {}).get("text", "")) for answer in answers)
            reads_text = _PROBE in as_text
            # where it takes parts for a text, it writes them as Python or JSON does
            is_written_out = "'text'" in as_parts or '"text"' in as_parts
            reads_parts = as_parts == as_text if reads_text else _PROBE in as_parts and not is_written_out
            self._read[role] = reads_text or not reads_parts, reads_parts
        return self._read[role]

    def close(self) -> None:
        """End the process. May be called twice; a later conversation starts another."""
        self._process.close()

    def _answer(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> dict[str, Any] | None:
        """What the process answers; None when it ended, or had to be killed."""
        return self._process.ask(
            {
                "messages": messages,
                "tools": tools or [],
                "variables": variables or {},
                "documents": documents or [],
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
            }
        )


def _refused(reason: str) -> ConversationError:
    return ConversationError(f"messages: the model's chat template refuses them: {reason[:200]}")
