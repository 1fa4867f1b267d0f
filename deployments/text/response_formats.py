r"""The table of response formats: how families write thinking and tool calls, in the form of Transformers' templates.

A format is data. `models` says who writes it. `marks` are texts in a chat template that tell it: one of them is enough,
and the first format that has one is taken. `fields` are those of a `response_template` of Transformers, without its
anchor, which the chat template tells, and with these readings of our own:

- A `tool_calls` field without `close` ends where its JSON value or its Python list ends.
- `content: python-calls` reads call expressions, `f(a=1), g()`, with literals as arguments.
- `xml-inline` types its values by the tool's schema; a group `string` that is "true" or "false" says it instead.
- `\A` matches at the start of the answer, and behind a thought.
- What the `content` field's `close` matches is dropped, but only right after a call: the ends of what wraps calls.

`anchors`: what an answer may follow, beside what the chat template writes to begin one. `call_ids`: "nine", which is
nine letters or digits, as Mistral's templates demand; "kimi", which is functions.NAME:INDEX, counted over the
conversation. `thought`: how a thought is begun and ended, where the fields do not say it. Sources: the chat templates
of the named checkpoints; the parsers of vLLM 0.32 and SGLang 0.5.23.
"""

from typing import Any

_THINK = {"open_pattern": r"\A\s*<think>", "close": "</think>", "content": "text"}
_TEXT = {"content": "text"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def _thinking(opens: str, closes: str) -> dict[str, str]:
    return {"open": opens, "close": closes, "content": "text"}


def _json(**field: Any) -> dict[str, Any]:
    """A field of calls in JSON: one object or an array of them, or the arguments alone where the opening has a name."""
    named = "(?P<name>" in field.get("open_pattern", "")
    return {**field, "repeats": True, "content": "json", **({"transform": _NAMED} if named else {})}


def _tagged(tag_pattern: str, **field: Any) -> dict[str, Any]:
    """A field of one call whose arguments are tags with bare text in them."""
    args = {"tag_pattern": tag_pattern}
    return {**field, "repeats": True, "content": "xml-inline", "content_args": args, "transform": _NAMED}


def _format(
    models: str,
    marks: list[str],
    tool_calls: dict[str, Any],
    content: dict[str, Any] = _TEXT,
    thinking: dict[str, str] = _THINK,
) -> dict[str, Any]:
    fields = {"reasoning_content": thinking, "tool_calls": tool_calls, "content": content}
    return {"models": models, "marks": marks, "fields": fields}


_PARAMETER = r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
_DSML_PARAMETER = (
    r'<｜DSML｜parameter name="(?P<key>[^"]+)"(?: string="(?P<string>true|false)")?>(?P<value>.*?)</｜DSML｜parameter>'
)
_HARMONY_START = r"(?:<\|start\|>assistant)?"
_GEMMA_STRINGS = {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}

FORMATS: dict[str, dict[str, Any]] = {
    # the recipient stands before or after the channel's name
    "harmony": {
        "models": "gpt-oss",
        "marks": ["<|channel|>"],
        "thought": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        "fields": {
            "reasoning_content": {
                "open_pattern": _HARMONY_START + r"<\|channel\|>analysis<\|message\|>",
                "close": "<|end|>",
                "repeats": True,
                "content": "text",
            },
            "tool_calls": _json(
                open_pattern=_HARMONY_START
                + r"(?: to=functions\.(?P<name>[^\s<]+) ?<\|channel\|>(?:commentary|analysis)"
                r"|<\|channel\|>(?:commentary|analysis) to=functions\.(?P<name>[^\s<]+))"
                r" ?(?:<\|constrain\|>)?(?:json)?<\|message\|>",
                close=["<|call|>", "<|end|>"],
            ),
            "content": {
                "open_pattern": _HARMONY_START
                + r"<\|channel\|>(?:final|commentary) ?(?:<\|constrain\|>\w+)?<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
                "content": "text",
            },
        },
    },
    "gemma4": {
        **_format(
            "Gemma 4",
            ["<|tool_call>"],
            _json(
                open_pattern=r"<\|tool_call>call:(?P<name>[^{\s]+)",
                close="<tool_call|>",
                content_args=_GEMMA_STRINGS,
            ),
            thinking=_thinking("<|channel>thought\n", "<channel|>"),
        ),
        "anchors": ["<tool_response|>"],
    },
    "functiongemma": _format(
        "FunctionGemma",
        ["<start_function_call>"],
        _json(
            open_pattern=r"<start_function_call>call:(?P<name>[^{\s]+)",
            close="<end_function_call>",
            content_args={"unquoted_keys": True, "string_delims": [["<escape>", "<escape>"]]},
        ),
    ),
    "deepseek_dsml": _format(
        "DeepSeek V3.2, V4",
        ["｜DSML｜"],
        _tagged(
            _DSML_PARAMETER,
            open_pattern=r'(?:<｜DSML｜(?:function_calls|tool_calls)>\s*)?<｜DSML｜invoke name="(?P<name>[^"]+)">',
            close="</｜DSML｜invoke>",
        ),
        {"content": "text", "close": ["</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"]},
    ),
    "deepseek": {
        **_format(
            "DeepSeek V3, R1, V3.1",
            ["<｜tool▁call▁begin｜>"],
            _json(
                open_pattern=r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>"
                r"(?:function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n|(?P<name>[^\n<]+)<｜tool▁sep｜>(?=\s*\{))",
                close_pattern=r"\s*(?:```\s*)?<｜tool▁call▁end｜>",
            ),
            {"content": "text", "close": "<｜tool▁calls▁end｜>"},
        ),
        "anchors": ["<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>"],
    },
    "kimi_k2": {
        **_format(
            "Kimi K2, K2.5",
            ["<|tool_call_begin|>"],
            _json(
                open_pattern=r"(?:<\|tool_calls?_section_begin\|>\s*)?<\|tool_call_begin\|>\s*(?:functions\.)?"
                r"(?P<name>[^<\s]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
                close="<|tool_call_end|>",
            ),
            {"content": "text", "close": ["<|tool_calls_section_end|>", "<|tool_call_section_end|>"]},
        ),
        "call_ids": "kimi",
    },
    "minimax_m2": _format(
        "MiniMax M2",
        ["<minimax:tool_call>"],
        _tagged(
            r'<parameter name="(?P<key>[^"]+)">\n?(?P<value>.*?)\n?</parameter>',
            open_pattern=r'(?:<minimax:tool_call>\s*)?<invoke name="(?P<name>[^"]+)">',
            close="</invoke>",
        ),
        {"content": "text", "close": "</minimax:tool_call>"},
    ),
    "glm4": _format(
        "GLM 4.5 and newer, Ling 3",
        ["<arg_key>"],
        _tagged(
            r"<arg_key>(?P<key>[^<]*+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            open_pattern=r"<tool_call>\s*(?P<name>[^\s<]+)\s*(?=<arg_key>|</tool_call>)",
            close="</tool_call>",
        ),
    ),
    "seed_oss": _format(
        "Seed-OSS",
        ["<seed:tool_call>"],
        _tagged(_PARAMETER, open_pattern=r"<seed:tool_call>\s*<function=(?P<name>[^>\n]+)>", close="</function>"),
        {"content": "text", "close": "</seed:tool_call>"},
        _thinking("<seed:think>", "</seed:think>"),
    ),
    # the outer tag is forgotten now and then
    "qwen3_coder": _format(
        "Qwen3-Coder, Qwen3.5, Nemotron 3, MiMo, Step 3.5",
        ["<function="],
        _tagged(_PARAMETER, open_pattern=r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]+)>", close="</function>"),
        {"content": "text", "close": "</tool_call>"},
    ),
    "cohere": {
        "models": "Cohere Command R7B, A",
        "marks": ["<|START_ACTION|>"],
        "fields": {
            "reasoning_content": _thinking("<|START_THINKING|>", "<|END_THINKING|>"),
            "tool_calls": _json(open="<|START_ACTION|>", close="<|END_ACTION|>"),
            "content": {"open": "<|START_RESPONSE|>", "close": "<|END_RESPONSE|>", "content": "text"},
        },
    },
    "mistral_args": {
        **_format(
            "Mistral from tokenizer v11 on",
            ["[ARGS]"],
            _json(open_pattern=r"\[TOOL_CALLS\]\s*(?P<name>[^\s\[]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{)"),
            thinking=_thinking("[THINK]", "[/THINK]"),
        ),
        "call_ids": "nine",
    },
    "mistral": {
        **_format("Mistral before v11", ["[TOOL_CALLS]"], _json(open_pattern=r"\[TOOL_CALLS\]\s*(?=\[)")),
        "call_ids": "nine",
    },
    "internlm": _format(
        "InternLM 2.5, 3", ["<|action_start|>"], _json(open="<|action_start|><|plugin|>", close="<|action_end|>")
    ),
    "lfm2": _format(
        "LFM2",
        ["<|tool_call_start|>"],
        {"open": "<|tool_call_start|>", "close": "<|tool_call_end|>", "repeats": True, "content": "python-calls"},
    ),
    "olmo3": _format(
        "Olmo 3",
        ["<function_calls>"],
        {"open": "<function_calls>", "close": "</function_calls>", "repeats": True, "content": "python-calls"},
    ),
    "nemotron": _format("Nemotron 2", ["<TOOLCALL>"], _json(open="<TOOLCALL>", close="</TOOLCALL>")),
    "tool_calls_array": _format(
        "Hunyuan A13B, Jamba", ["<tool_calls>"], _json(open="<tool_calls>", close="</tool_calls>")
    ),
    "granite": _format(
        "Granite 3, Phi-4-mini's newer template",
        ["<|tool_call|>"],
        _json(open_pattern=r"<\|tool_call\|>\s*(?=[\[{])"),
        {"content": "text", "close": "<|/tool_call|>"},
    ),
    "granite_20b": _format(
        "Granite 20B function calling", ["<function_call>"], _json(open_pattern=r"<function_call>\s*(?=\{)")
    ),
    "longcat": _format(
        "LongCat",
        ["<longcat_tool_call>"],
        _json(open="<longcat_tool_call>", close="</longcat_tool_call>"),
        thinking=_thinking("<longcat_think>", "</longcat_think>"),
    ),
    "hermes": _format(
        "Hermes, Qwen2.5, Qwen3, Granite 4, EXAONE 4, ERNIE 4.5, xLAM",
        ["<tool_call>"],
        _json(open="<tool_call>", close="</tool_call>"),
    ),
    "phi4_mini": _format("Phi-4-mini", ["<|tool|>", "functools"], _json(open_pattern=r"functools\s*(?=\[)")),
    "llama4": _format(
        "Llama 4",
        ["<|python_start|>"],
        {
            "open_pattern": r"(?:\A\s*|<\|python_start\|>\s*)(?=\[\s*[A-Za-z_][\w.]*\()",
            "repeats": True,
            "content": "python-calls",
        },
        {"content": "text", "close": "<|python_end|>"},
    ),
    # bare JSON at the start, or behind a tag; several are parted by semicolons
    "llama3_json": _format(
        "Llama 3.1, 3.2, 3.3",
        ["<|python_tag|>", "Environment: ipython"],
        _json(open_pattern=r"(?:\A\s*|<\|python_tag\|>\s*|;\s*)(?=\{\s*\")"),
    ),
    "pythonic": _format(
        "ToolACE, Llama 3.2 as it was first prompted",
        ["[func_name1("],
        {"open_pattern": r"\A\s*(?=\[\s*[A-Za-z_][\w.]*\()", "repeats": True, "content": "python-calls"},
    ),
    "thinking": {
        "models": "models that think and have no format for calls: DeepSeek R1's distillations, QwQ",
        "marks": ["</think>"],
        "fields": {"reasoning_content": _THINK, "content": _TEXT},
    },
}
