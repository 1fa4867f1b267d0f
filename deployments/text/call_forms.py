"""How models write calls: one form of each format, as the chat template writes it, for grammars that make a model call.

response_formats.py says how calls are read, in every way that they occur; here is the one way in which they are asked
for. In the texts %NAME is the function's name, %ARGS its arguments, %KEY and %VALUE those of one argument, %INDEX a
number, %NINE nine letters or digits, %STRING whether a value is bare text, and %LF a line break or nothing.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from deployments.text.response_formats import FORMATS

_OBJECT = '{"name": "%NAME", "arguments": %ARGS}'
_LLAMA_OBJECT = '{"name": "%NAME", "parameters": %ARGS}'


@dataclass(frozen=True)
class CallForm:
    """`before` and `after` stand around all calls, `between` between two of them."""

    call: str
    dialect: Literal["json", "tags", "gemma", "python"] = "json"
    before: str = ""
    between: str = ""
    after: str = ""
    tag: str = ""  # of one argument
    string_mark: str = ""  # around strings
    inner: str = ""  # by which a call without `before` would be found, too
    is_bare: bool = False  # no mark tells a call: it is the whole answer, and begins with its bracket
    banned: tuple[str, ...] = ()  # regular expressions of more texts by which a call would be found
    content: tuple[str, str] = ("", "")  # marks around what is no call


_PARAMETER = "<parameter=%KEY>\n%VALUE\n</parameter>\n"
_CODER = "<function=%NAME>\n%ARGS</function>"

FORMS: dict[str, CallForm] = {
    "harmony": CallForm(
        "<|channel|>commentary to=functions.%NAME <|constrain|>json<|message|>%ARGS<|call|>",
        between="<|start|>assistant",
        banned=(r" to=functions\.",),
        content=("<|channel|>final<|message|>", "<|return|>"),
    ),
    "gemma4": CallForm("<|tool_call>call:%NAME%ARGS<tool_call|>", "gemma", string_mark='<|"|>'),
    "functiongemma": CallForm(
        "<start_function_call>call:%NAME%ARGS<end_function_call>", "gemma", string_mark="<escape>"
    ),
    "deepseek_dsml": CallForm(
        '<｜DSML｜invoke name="%NAME">\n%ARGS</｜DSML｜invoke>\n',
        "tags",
        before="<｜DSML｜function_calls>\n",
        after="</｜DSML｜function_calls>",
        tag='<｜DSML｜parameter name="%KEY" string="%STRING">%VALUE</｜DSML｜parameter>\n',
        inner='<｜DSML｜invoke name="',
    ),
    "deepseek": CallForm(
        "<｜tool▁call▁begin｜>%NAME<｜tool▁sep｜>%ARGS<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
        inner="<｜tool▁call▁begin｜>",
    ),
    "kimi_k2": CallForm(
        "<|tool_call_begin|>functions.%NAME:%INDEX<|tool_call_argument_begin|>%ARGS<|tool_call_end|>",
        before="<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
        inner="<|tool_call_begin|>",
    ),
    "minimax_m2": CallForm(
        '<invoke name="%NAME">\n%ARGS</invoke>\n',
        "tags",
        before="<minimax:tool_call>\n",
        after="</minimax:tool_call>",
        tag='<parameter name="%KEY">%VALUE</parameter>\n',
        inner='<invoke name="',
    ),
    "glm4": CallForm(
        "<tool_call>%NAME%LF%ARGS</tool_call>",
        "tags",
        between="%LF",
        tag="<arg_key>%KEY</arg_key>%LF<arg_value>%VALUE</arg_value>%LF",
    ),
    "seed_oss": CallForm(
        f"<seed:tool_call>\n{_CODER}\n</seed:tool_call>",
        "tags",
        between="\n",
        tag="<parameter=%KEY>%VALUE</parameter>\n",
    ),
    "qwen3_coder": CallForm(
        f"<tool_call>\n{_CODER}\n</tool_call>", "tags", between="\n", tag=_PARAMETER, inner="<function="
    ),
    "cohere": CallForm(
        '{"tool_call_id": "%INDEX", "tool_name": "%NAME", "parameters": %ARGS}',
        before="<|START_ACTION|>[%LF",
        between=",%LF",
        after="%LF]<|END_ACTION|>",
        content=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "mistral_args": CallForm("[TOOL_CALLS]%NAME[ARGS]%ARGS"),
    "mistral": CallForm(_OBJECT, before="[TOOL_CALLS] [", between=", ", after="]"),
    "internlm": CallForm(f"<|action_start|><|plugin|>%LF{_LLAMA_OBJECT}%LF<|action_end|>", between="%LF"),
    "lfm2": CallForm("%NAME(%ARGS)", "python", before="<|tool_call_start|>[", between=", ", after="]<|tool_call_end|>"),
    "olmo3": CallForm(
        "%NAME(%ARGS)", "python", before="<function_calls>%LF", between="\n", after="%LF</function_calls>"
    ),
    "nemotron": CallForm(_OBJECT, before="<TOOLCALL>[", between=", ", after="]</TOOLCALL>"),
    "tool_calls_array": CallForm(_OBJECT, before="<tool_calls>[", between=", ", after="]</tool_calls>"),
    "granite": CallForm(_OBJECT, before="<|tool_call|>[", between=", ", after="]"),
    "granite_20b": CallForm(f"<function_call> {_OBJECT}", between="\n"),
    "longcat": CallForm(f"<longcat_tool_call>%LF{_OBJECT}%LF</longcat_tool_call>", between="%LF"),
    "hermes": CallForm(f"<tool_call>%LF{_OBJECT}%LF</tool_call>", between="%LF"),
    "phi4_mini": CallForm(_OBJECT, before="functools[", between=", ", after="]"),
    "llama4": CallForm(
        "%NAME(%ARGS)",
        "python",
        before="[",
        between=", ",
        after="]",
        is_bare=True,
        banned=(r"<\|python_start\|>",),
    ),
    "llama3_json": CallForm(_LLAMA_OBJECT, between="; ", is_bare=True, banned=(r"<\|python_tag\|>", r";\s*\{\s*\"")),
    "pythonic": CallForm("%NAME(%ARGS)", "python", before="[", between=", ", after="]", is_bare=True),
}
assert FORMS.keys() == FORMATS.keys() - {"thinking"}


def form_of(name: str, chat_template: str) -> CallForm | None:
    """The form in which a model of this format writes calls; its chat template tells versions apart."""
    form = FORMS.get(name)
    changes: dict[str, Any] = {}
    if name == "deepseek_dsml" and "｜DSML｜tool_calls" in chat_template:
        changes = {"before": "<｜DSML｜tool_calls>\n", "after": "</｜DSML｜tool_calls>"}
    elif name == "deepseek" and "```json" in chat_template:
        call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%NAME\n```json\n%ARGS\n```<｜tool▁call▁end｜>"
        changes = {"call": call, "between": "\n"}
    elif name == "mistral_args" and "[CALL_ID]" in chat_template:
        changes = {"call": "[TOOL_CALLS]%NAME[CALL_ID]%NINE[ARGS]%ARGS"}
    elif name == "granite" and "<|/tool_call|>" in chat_template:
        changes = {"after": "]<|/tool_call|>"}
    return None if form is None else dataclasses.replace(form, **changes)
