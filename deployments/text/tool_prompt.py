"""Tools for chat templates that know none: they are written into the messages, in the way of Hermes and Qwen."""

import dataclasses
import json
import re
from typing import Any

from deployments.text.prompts import Conversation, content_text

_READS_TOOLS = re.compile(r"""\{[%{][^%}]*(?<![\w.'"])tools(?![\w'"])""")  # as a variable, in a tag
_INTRODUCTION = """You may call one or more functions to assist with the user's request. These are the functions:
<tools>
{tools}
</tools>
For each call write a JSON object with the function's name and its arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


def reads_tools(template: str) -> bool:
    """Whether a chat template knows tools. Some look for them in a message, where nobody puts them."""
    return _READS_TOOLS.search(template) is not None


def without_tools(conversation: Conversation) -> Conversation:
    """The same conversation in messages of system, user and assistant alone, all of them text."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{content_text(message['content'])}\n</tool_response>"
            _add(messages, {"role": "user", "content": text}, joins=bool(messages) and "is_result" in messages[-1])
            messages[-1]["is_result"] = True
        elif message.get("tool_calls"):
            texts = [content_text(message.get("content")), *map(_written, message["tool_calls"])]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            messages.append({**rest, "content": "\n".join(filter(None, texts))})
        else:
            follows_result = bool(messages) and "is_result" in messages[-1] and message["role"] == "user"
            _add(messages, message, joins=follows_result)  # templates want user and assistant to alternate
    for message in messages:
        message.pop("is_result", None)
    if conversation.tools:
        _introduce(messages, "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools))
    return dataclasses.replace(conversation, messages=messages, tools=[])


def _written(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"


def _add(messages: list[dict[str, Any]], message: dict[str, Any], joins: bool) -> None:
    """Append the message, or its text to the last one's."""
    if joins:
        texts = content_text(messages[-1]["content"]), content_text(message["content"])
        messages[-1]["content"] = "\n".join(texts)
    else:
        messages.append(dict(message))


def _introduce(messages: list[dict[str, Any]], tools: str) -> None:
    """Name the tools: behind the system message, or where there is none before the first one."""
    introduction = _INTRODUCTION.format(tools=tools)
    first = messages[0]
    is_system = first["role"] in ("system", "developer")
    text = content_text(first["content"])
    texts = [text, introduction] if is_system else [introduction, text]
    messages[0] = {**first, "content": "\n\n".join(filter(None, texts))}
