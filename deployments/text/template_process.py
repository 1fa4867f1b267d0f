"""The worker that renders chat templates, in a limited process: a conversation in, its text out.

A chat template is a program that comes with the model and runs on what clients write. Here it cannot delay other
requests. See limited_program.py and chat_template.py.
"""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template


def render(template: str, special_tokens: dict[str, str], request: dict[str, Any], max_chars: int) -> object:
    """`{"text"}`, or why there is none: `{"refused": why}`, `{"failed": exception}`, `{"too_long": characters}`.

    `request`: messages, tools, documents, add_generation_prompt, continue_final_message and further variables of the
    template.
    """
    variables = {**special_tokens, **request["variables"]}
    options = {name: request[name] for name in ("add_generation_prompt", "continue_final_message")}
    options |= {name: request[name] or None for name in ("tools", "documents")}
    try:
        for messages in _variants(request["messages"]):
            try:
                (text,), _ = render_jinja_template([messages], chat_template=template, **options, **variables)
                break
            except TypeError as error:
                failed = error
        else:
            raise failed
    except TemplateError as error:
        return {"refused": str(error)[:1000]}
    except ValueError as error:
        if request["continue_final_message"]:  # the error quotes the conversation
            return {"refused": "it does not show the last message as it is, so no answer can go on with it"}
        return {"failed": type(error).__name__}
    except Exception as error:  # noqa: BLE001 - the model's program may raise anything
        return {"failed": type(error).__name__}
    return {"text": text} if len(text) <= max_chars else {"too_long": len(text)}


def _variants(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages, and where a template fails on them: arguments as the text that it adds to others; no null."""
    yield messages
    if any(message.get("tool_calls") for message in messages):
        as_text = [_with_arguments_as_text(message) for message in messages]
        yield as_text
        for one in (messages, as_text):
            yield [{**message, "content": message["content"] or ""} for message in one]


def _with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


def stop_clock(now: datetime) -> None:
    """Let templates that print a date see this one. Functions cannot be handed to them: what they get is made plain."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return now

    render_jinja_template.__globals__["datetime"] = Stopped


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """See limited_program.py. `setup`: template, special_tokens, now and max_chars."""
    if setup["now"] is not None:
        stop_clock(datetime.fromisoformat(setup["now"]))
    return lambda request: render(setup["template"], setup["special_tokens"], request, setup["max_chars"])
