"""The response format of a model: its own template where the tokenizer has one, else one of our table."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    ResponseTemplateField,
    load_response_template,
)

from deployments.text.response_formats import FORMATS
from deployments.text.tool_calls import PYTHON_CALLS
from deployments.text.tool_prompt import reads_tools

logger = logging.getLogger(__name__)

CALLS = "calls"
REASONING = "reasoning"
DEFAULT = "hermes"  # for chat templates that know no tools: the calls are asked for in the prompt
_NO_ANCHOR = r"(?!)"  # matches nothing


@dataclass(frozen=True)
class ResponseFormat:
    """How one model writes thinking and tool calls."""

    name: str
    template: ResponseTemplate
    call_ids: str | None = None  # see response_formats.py
    is_foreign: bool = False  # its patterns come with the checkpoint

    @property
    def has_calls(self) -> bool:
        """Whether it says how calls are written."""
        return any(kind_of(field) == CALLS for field in self.template.fields.values())

    @property
    def has_thinking(self) -> bool:
        """Whether it says how thinking is written."""
        return any(kind_of(field) == REASONING for field in self.template.fields.values())

    def prefix(self, prompt: str) -> str:
        """What a prompt has of the answer already: its text after the last anchor; empty where there is none."""
        end = None
        for match in self.template.start_anchor_re.finditer(prompt):
            end = match.end()
        return "" if end is None else prompt[end:]


def kind_of(field: ResponseTemplateField) -> Literal["calls", "reasoning", "content"]:
    """What a field of a template is to clients."""
    if field.name == "tool_calls":
        return "calls"
    return "reasoning" if field.name in ("reasoning_content", "reasoning", "thinking") else "content"


def choose_format(
    asked: str, own_template: Any, chat_template: str, added_tokens: Collection[str], generation_prompt: str
) -> ResponseFormat | None:
    """The format for `model.tool_format`; None where answers are text and nothing else.

    `own_template`: the tokenizer's response_template. `generation_prompt`: what the chat template writes to begin an
    answer. Raises ValueError for a format that is not in the table.
    """
    if asked == "none":
        return None
    if asked not in ("auto", *FORMATS):
        raise ValueError(
            f"model.tool_format: there is no format {asked!r}; set auto, none or one of {', '.join(FORMATS)}"
        )
    if asked == "auto" and own_template is not None:
        try:
            return ResponseFormat("the checkpoint's own", load_response_template(own_template), is_foreign=True)
        except (ValueError, TypeError, AttributeError) as error:
            logger.warning("the tokenizer's response_template is passed over, for it is wrong: %s", error)
    name: str | None = asked
    if asked == "auto":
        name = _detected(chat_template) if reads_tools(chat_template) else DEFAULT
    known = [chat_template, *added_tokens]
    return None if name is None else _of_table(name, known, generation_prompt)


def _detected(chat_template: str) -> str | None:
    found = (name for name, entry in FORMATS.items() if any(mark in chat_template for mark in entry["marks"]))
    return next(found, None)


def _of_table(name: str, known: list[str], generation_prompt: str) -> ResponseFormat | None:
    """The format of that name. It reads thinking only where the model knows the marks, by template or vocabulary."""
    entry = FORMATS[name]
    fields = {}
    for key, field in entry["fields"].items():
        closes = field.get("close", "")
        if key != "reasoning_content" or any(closes in text for text in known):
            fields[key] = {**field, "content": "json" if field["content"] == PYTHON_CALLS else field["content"]}
    anchor = generation_prompt
    for key in ("open", "close"):
        mark = entry["fields"]["reasoning_content"].get(key, "<think>")
        anchor = anchor.partition(mark)[0]
    anchors = [*([anchor] if anchor else []), *entry.get("anchors", [])]
    anchored = {"start_anchor": anchors} if anchors else {"start_anchor_pattern": _NO_ANCHOR}
    template = load_response_template({**anchored, "fields": fields})
    for key, field in template.fields.items():
        field.content = entry["fields"][key]["content"]
    return ResponseFormat(name, template, entry.get("call_ids"))
