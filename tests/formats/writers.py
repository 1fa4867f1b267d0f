"""How families write thinking and tool calls: what the table of formats has to read, written without it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Calls = list[tuple[str, dict[str, Any]]]

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "share": {"type": "number"},
            "is_metric": {"type": "boolean"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "place": {"$ref": "#/$defs/Place"},
        },
        "$defs": {"Place": {"type": "object"}},
    },
    "write-file": {"properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
    "now": {"type": "object", "properties": {}},
}
TEXTS = [
    "Paris", "São Paulo", "東京 👋🏽", "", 'a "quoted" word', "it's", "1", "true", "null", "{not json}", "[1, 2",
    "a\\b", "x = {'a': 1}; y", "line one\nline two", "<b>bold</b>", "a]b}c)", "100 % \t tab", "e\u0301\u200d\ufeff",
]  # fmt: skip


def some_calls(dice: random.Random, count: int) -> Calls:
    """Calls with arguments of all types, nested ones too."""

    def text() -> str:
        return dice.choice(TEXTS)

    makers: dict[str, Callable[[], Any]] = {
        "city": text,
        "days": lambda: dice.choice([0, -3, 7, 10**12]),
        "share": lambda: dice.choice([0.5, -1.25, 3]),
        "is_metric": lambda: dice.random() < 0.5,
        "note": lambda: dice.choice([None, "x"]),
        "tags": lambda: [text() for _ in range(dice.randrange(3))],
        "place": lambda: {"lat": 1.5, "deep": {"er": [{"a": text()}, None, True]}, "ключ": text()},
    }
    calls: Calls = []
    for _ in range(count):
        name = dice.choice(list(TOOLS))
        if name == "now":
            calls.append((name, {}))
        elif name == "write-file":
            calls.append((name, {"path": text(), "text": text()}))
        else:
            keys = dice.sample(list(makers), dice.randrange(1, len(makers)))
            calls.append((name, {key: makers[key]() for key in keys}))
    return calls


@dataclass(frozen=True)
class Family:
    """One way to write an answer."""

    format: str
    write: Callable[[Calls], str]
    thinking: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    has_text_around: bool = True  # text may stand before and behind calls
    has_dashes: bool = True  # names may have them
    has_calls_in_thought: bool = True  # calls are known by their marks alone
    text: tuple[str, str] = ("", "")  # marks around text


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _objects(arguments: str = "arguments", name: str = "name", **more: Any) -> Callable[[Calls], list[dict[str, Any]]]:
    return lambda calls: [{**more, name: called, arguments: given} for called, given in calls]


def _array(before: str, after: str = "", arguments: str = "arguments", name: str = "name") -> Callable[[Calls], str]:
    return lambda calls: before + _dump(_objects(arguments, name)(calls)) + after


def _each(template: str, between: str = "", before: str = "", after: str = "") -> Callable[[Calls], str]:
    """A call after the other: what % marks in the template is filled in."""

    def write(calls: Calls) -> str:
        written = [
            template.replace("%NAME", name).replace("%INDEX", str(at)).replace("%ARGS", _dump(arguments))
            for at, (name, arguments) in enumerate(calls)
        ]
        return before + between.join(written) + after

    return write


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else _dump(value)


def _tags(call: str, tag: str, between: str, before: str = "", after: str = "") -> Callable[[Calls], str]:
    def write(calls: Calls) -> str:
        written = [
            call.replace("%NAME", name).replace(
                "%ARGS",
                "".join(tag.replace("%KEY", key).replace("%VALUE", _bare(value)) for key, value in given.items()),
            )
            for name, given in calls
        ]
        return before + between.join(written) + after

    return write


def _dsml(calls: Calls) -> str:
    blocks = []
    for name, given in calls:
        tags = [
            f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">{_bare(value)}'
            "</｜DSML｜parameter>\n"
            for key, value in given.items()
        ]
        blocks.append(f'<｜DSML｜invoke name="{name}">\n{"".join(tags)}</｜DSML｜invoke>\n')
    return f"<｜DSML｜function_calls>\n{''.join(blocks)}</｜DSML｜function_calls>"


def _gemma(value: Any, mark: str) -> str:
    if isinstance(value, str):
        return mark + value + mark
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma(one, mark)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_gemma(one, mark) for one in value) + "]"
    return _dump(value)


def _gemma_calls(before: str, after: str, mark: str) -> Callable[[Calls], str]:
    return lambda calls: "".join(f"{before}call:{name}{_gemma(given, mark)}{after}" for name, given in calls)


def _python(before: str, after: str, between: str = ", ") -> Callable[[Calls], str]:
    def write(calls: Calls) -> str:
        written = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls]
        return before + between.join(written) + after

    return write


def _harmony(calls: Calls) -> str:
    first = "<|channel|>commentary to=functions.%NAME <|constrain|>json<|message|>%ARGS<|call|>"
    return _each(first, "<|start|>assistant")(calls)


def _harmony_of_recipients(calls: Calls) -> str:
    call = "<|start|>assistant to=functions.%NAME<|channel|>commentary json<|message|>%ARGS<|call|>"
    return _each(call)(calls)


_DEEPSEEK_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%NAME\n```json\n%ARGS\n```<｜tool▁call▁end｜>"
_DEEPSEEK_WRAP = {"before": "<｜tool▁calls▁begin｜>", "after": "<｜tool▁calls▁end｜>"}
_HARMONY_THINKING = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
_HARMONY = {"thinking": _HARMONY_THINKING, "has_text_around": False, "has_calls_in_thought": False}
_KIMI = "<|tool_call_begin|>functions.%NAME:%INDEX<|tool_call_argument_begin|>%ARGS<|tool_call_end|>"
_BARE = {"has_text_around": False, "has_calls_in_thought": False}
_CODER = "<tool_call>\n<function=%NAME>\n%ARGS</function>\n</tool_call>"
_CODER_TAG = "<parameter=%KEY>\n%VALUE\n</parameter>\n"

FAMILIES: dict[str, Family] = {
    "Qwen3": Family("hermes", _each('<tool_call>\n{"name": "%NAME", "arguments": %ARGS}\n</tool_call>', "\n")),
    "Hermes without line breaks": Family(
        "hermes", _each('<tool_call>{"name": "%NAME", "arguments": %ARGS}</tool_call>')
    ),
    "Granite 3.1": Family("hermes", _array("<tool_call>", "</tool_call>")),
    "Qwen3-Coder": Family("qwen3_coder", _tags(_CODER, _CODER_TAG, "\n")),
    "Qwen3-Coder without the outer tag": Family(
        "qwen3_coder", _tags(_CODER.removeprefix("<tool_call>\n"), _CODER_TAG, "\n"), has_calls_in_thought=False
    ),
    "Seed-OSS": Family(
        "seed_oss",
        _tags(_CODER.replace("tool_call", "seed:tool_call"), "<parameter=%KEY>%VALUE</parameter>\n", "\n"),
        ("<seed:think>", "</seed:think>"),
    ),
    "GLM 4.5": Family(
        "glm4",
        _tags("<tool_call>%NAME\n%ARGS</tool_call>", "<arg_key>%KEY</arg_key>\n<arg_value>%VALUE</arg_value>\n", "\n"),
    ),
    "GLM 4.7": Family(
        "glm4", _tags("<tool_call>%NAME%ARGS</tool_call>", "<arg_key>%KEY</arg_key><arg_value>%VALUE</arg_value>", "")
    ),
    "MiniMax M2": Family(
        "minimax_m2",
        _tags(
            '<invoke name="%NAME">\n%ARGS</invoke>\n',
            '<parameter name="%KEY">%VALUE</parameter>\n',
            "",
            "<minimax:tool_call>\n",
            "</minimax:tool_call>",
        ),
    ),
    "DeepSeek V3.2": Family("deepseek_dsml", _dsml),
    "DeepSeek V3": Family("deepseek", _each(_DEEPSEEK_V3, "\n", **_DEEPSEEK_WRAP)),
    "DeepSeek V3.1": Family(
        "deepseek", _each("<｜tool▁call▁begin｜>%NAME<｜tool▁sep｜>%ARGS<｜tool▁call▁end｜>", **_DEEPSEEK_WRAP)
    ),
    "Kimi K2": Family("kimi_k2", _each(_KIMI, "", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")),
    "Mistral v3": Family("mistral", _array("[TOOL_CALLS] ")),
    "Mistral v11": Family(
        "mistral_args", _each("[TOOL_CALLS]%NAME[CALL_ID]a1b2c3d4e[ARGS]%ARGS"), ("[THINK]", "[/THINK]")
    ),
    "Mistral v13": Family("mistral_args", _each("[TOOL_CALLS]%NAME[ARGS]%ARGS"), ("[THINK]", "[/THINK]")),
    "Llama 3.1": Family("llama3_json", _each('{"name": "%NAME", "parameters": %ARGS}', "; "), **_BARE),
    "Llama 3.1 with its tag": Family(
        "llama3_json", _each('{"name": "%NAME", "parameters": %ARGS}', ";", "<|python_tag|>"), **_BARE
    ),
    "Llama 4": Family("llama4", _python("<|python_start|>[", "]<|python_end|>"), has_dashes=False, **_BARE),
    "Llama 4 without its tags": Family("llama4", _python("[", "]"), has_dashes=False, **_BARE),
    "ToolACE": Family("pythonic", _python("[", "]"), has_dashes=False, **_BARE),
    "LFM2": Family("lfm2", _python("<|tool_call_start|>[", "]<|tool_call_end|>"), has_dashes=False),
    "Olmo 3": Family("olmo3", _python("<function_calls>", "</function_calls>", "\n"), has_dashes=False),
    "gpt-oss": Family("harmony", _harmony, **_HARMONY, text=("<|channel|>final<|message|>", "")),
    "gpt-oss, recipient first": Family(
        "harmony",
        _harmony_of_recipients,
        (_HARMONY_THINKING[0], "<|end|>"),
        has_text_around=False,
        has_calls_in_thought=False,
        text=("<|channel|>final<|message|>", "<|end|>"),
    ),
    "Gemma 4": Family(
        "gemma4", _gemma_calls("<|tool_call>", "<tool_call|>", '<|"|>'), ("<|channel>thought\n", "<channel|>")
    ),
    "FunctionGemma": Family("functiongemma", _gemma_calls("<start_function_call>", "<end_function_call>", "<escape>")),
    "Granite 3": Family("granite", _array("<|tool_call|>")),
    "Phi-4-mini by its newer template": Family(
        "granite", _each('<|tool_call|>{"name": "%NAME", "arguments": %ARGS}<|/tool_call|>')
    ),
    "Granite 20B": Family("granite_20b", _each('<function_call> {"name": "%NAME", "arguments": %ARGS}', "\n")),
    "Phi-4-mini": Family("phi4_mini", _array("functools")),
    "Command R7B": Family(
        "cohere",
        _array("<|START_ACTION|>", "<|END_ACTION|>", "parameters", "tool_name"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        has_calls_in_thought=False,
        text=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "Jamba": Family("tool_calls_array", _array("<tool_calls>", "</tool_calls>")),
    "Nemotron 2": Family("nemotron", _array("<TOOLCALL>", "</TOOLCALL>")),
    "InternLM 2.5": Family(
        "internlm", _each('<|action_start|><|plugin|>{"name": "%NAME", "parameters": %ARGS}<|action_end|>', "\n")
    ),
    "LongCat": Family(
        "longcat",
        _each('<longcat_tool_call>{"name": "%NAME", "arguments": %ARGS}</longcat_tool_call>', "\n"),
        ("<longcat_think>", "</longcat_think>"),
    ),
}
