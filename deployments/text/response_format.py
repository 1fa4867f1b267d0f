"""The response format of a model: its own template where the tokenizer has one, else one of our table."""

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    ResponseTemplateField,
    load_response_template,
)

from deployments.text.call_forms import CallForm, form_of
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
    form: CallForm | None = None  # how calls are written; None: not known
    thought: tuple[str, str] | None = None  # the marks that begin and end a thought; None: not known

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
            return _of_checkpoint(load_response_template(own_template), chat_template)
        except (ValueError, TypeError, AttributeError) as error:
            logger.warning("the tokenizer's response_template is passed over, for it is wrong: %s", error)
    name: str | None = asked
    if asked == "auto":
        name = _detected(chat_template) if reads_tools(chat_template) else DEFAULT
    known = [chat_template, *added_tokens]
    found = None if name is None else _of_table(name, known, generation_prompt)
    return None if found is None else dataclasses.replace(found, form=form_of(found.name, chat_template))


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
    thinks = entry["fields"]["reasoning_content"]
    thought = entry.get("thought", (thinks.get("open", "<think>"), thinks["close"]))
    return ResponseFormat(name, template, entry.get("call_ids"), thought=thought)


def _of_checkpoint(template: ResponseTemplate, chat_template: str) -> ResponseFormat:
    """A checkpoint's own format. How calls are written is known where its marks are texts, or by its chat template."""
    fields = {str(kind_of(field)): field for field in template.fields.values()}
    marks = {kind: (field.open_literals, field.close_literals) for kind, field in fields.items()}
    opens, closes = marks.get(CALLS, (None, None))
    form = form_of(_detected(chat_template) or "", chat_template)
    if opens and closes and fields[CALLS].content == "json" and not fields[CALLS].content_args:
        form = form_of(DEFAULT, "")
        assert form is not None
        form = dataclasses.replace(
            form, call=form.call.replace("<tool_call>", opens[0]).replace("</tool_call>", closes[0])
        )
    begins, ends = marks.get(REASONING, (None, None))
    thought = (begins[0], ends[0]) if begins and ends else None
    return ResponseFormat("the checkpoint's own", template, is_foreign=True, form=form, thought=thought)
