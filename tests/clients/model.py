"""A replica whose model says what clients need to hear: calls of the tools that it is shown, JSON, words, a long count.

Its words follow from the prompt alone. Where a request comes with a grammar, they are the first of its answers that the
grammar takes from beginning to end, by the matcher that ranks use.
"""

import json
import re
import time

from actors.decisions.grammar import GrammarError, GrammarMatcher, make_vocabulary
from tests.fakes.fake_executor import FakeExecutor
from tests.pure.conftest import World
from tests.pure.test_http_tools import make_text

MODEL = "tiny"
MAX_MODEL_LEN = 4096
COUNT = " ".join(map(str, range(1, 700)))
PLACE = {"city": "Paris", "country": "France"}
# In the way of Qwen3: a list of tools, calls and results between marks, thinking before the answer
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools> <tool_call>"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def answers(prompt: str) -> list[str]:
    """What the model would say after a prompt, dearest first."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?=<\|im_end\|>|\Z)", prompt, re.DOTALL)
    asked_at = max((at for at, (role, _) in enumerate(turns) if role == "user"), default=0)
    asked = turns[asked_at][1] if turns else ""
    num_results = sum(role == "tool" for role, _ in turns[asked_at:])
    listed = re.search(r"<tools>\n(.*?)</tools>", prompt, re.DOTALL)
    tools = [json.loads(line)["function"] for line in listed[1].splitlines()] if listed else []
    said = [_call(tool) for tool in tools[num_results:]]
    if "count" in asked:
        said.append(COUNT)
    if "think" in asked:
        said.append("<think>\nIs it? It is.\n</think>\n\nYes.")
    return [*said, "It is 21 degrees in Paris." if num_results else "Hello, world.", json.dumps(PLACE), "yes"]


def _call(tool: dict) -> str:
    properties = (tool.get("parameters") or {}).get("properties", {})
    arguments = {name: PLACE[name] for name in properties if name in PLACE}
    call = json.dumps({"name": tool["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


class SpeakingExecutor(FakeExecutor):
    """Says `answers`, 2 ms a token where it counts, and follows grammars."""

    def __init__(self, text) -> None:
        super().__init__(vocab_size=len(text._tokenizer))
        self._text = text
        self._end_id = min(text.eos_token_ids)
        self._vocabulary = make_vocabulary(text._tokenizer.backend_tokenizer.to_str(), self.vocab_size, [self._end_id])
        self.num_said = 0

    def _draw(self, row, ids):
        said = getattr(row, "script", None)
        if said is None:
            said = row.script = self._script(ids[: row.num_prompt], row.sampling.grammar)
        self.num_said += 1
        if len(said) > 2000:
            time.sleep(0.002)
        at = len(ids) - row.num_prompt
        return said[at] if at < len(said) else self._end_id

    def _script(self, prompt_ids, grammar):
        prompt = self._text._decode(prompt_ids, skip_special_tokens=False)
        scripts = [[*self._text._tokenize(words, False), self._end_id] for words in answers(prompt)]
        return next((ids for ids in scripts if grammar is None or self._takes(grammar, ids)), [self._end_id])

    def _takes(self, grammar, ids):
        matcher = GrammarMatcher(self._vocabulary, grammar, [self._end_id])
        for token in ids:
            if not matcher.allowed()[token // 8] >> token % 8 & 1:
                return False
            try:
                matcher.follow([token])
            except GrammarError:
                return False
        return True


def make_world(folder):
    """Engine and HTTP app over this model, with its tokenizer written to `folder`; whoever makes it closes it."""
    text = make_text(folder, TEMPLATE, ["<|im_start|>"], MARKS)
    executor = SpeakingExecutor(text)
    limits = {"max_model_len": MAX_MODEL_LEN, "vocab_size": executor.vocab_size, "max_body_bytes": 1 << 20}
    return World(text, executor, num_blocks=2048, **limits)
