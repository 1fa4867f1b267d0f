"""Grammar compiler: finds out in limited processes whether a grammar can be followed, before a request is let in."""

import asyncio
import hashlib
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.decisions.grammar import LIMITS
from deployments.text.grammar_text import GrammarError, GrammarText, Marks
from deployments.text.limited_process import LimitedProcess
from deployments.text.prompts import public_text

QUICK_CPU_S = 0.25  # nearly all grammars take less than 0.02 s
SLOW_CPU_S = 2.0
MEMORY_BYTES = 512 * 1024 * 1024
NICE = 19  # behind everything that answers
_WALL_S = 60.0  # so far behind, it may wait for a processor
_MAX_CACHED = 4096
_MAX_CACHED_CHARS = 16 * 1024 * 1024
# what llguidance counts itself, as on the ranks
_COUNTED = (
    "max_items_in_row",
    "initial_lexer_fuel",
    "step_lexer_fuel",
    "step_max_items",
    "max_lexer_states",
    "max_grammar_size",
    "verbose_errors",
)


class GrammarCompiler:
    """Used in the event loop's thread. What takes long moves to a second process, behind which nobody else waits."""

    def __init__(self, marks: Marks, vocab_size: int) -> None:
        """`vocab_size`: ids of the tokenizer, those of `marks` among them."""
        setup = {
            "vocab_size": vocab_size,
            "special": [[token_id, text] for text, token_id in marks.ids.items()],
            "ends": sorted(marks.ends),
            "limits": {name: getattr(LIMITS, name) for name in _COUNTED},
        }
        self._lanes = [_Lane(setup, cpu_s) for cpu_s in (QUICK_CPU_S, SLOW_CPU_S)]
        self._cache: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._num_cached_chars = 0

    async def compile(self, grammar: GrammarText) -> str:
        """The text that ranks follow. Raises GrammarError, with the field at fault, where it cannot be followed."""
        rules, own = grammar.render("answer"), grammar.own_grammar
        key = hashlib.sha256(f"{rules}\0{own}".encode()).hexdigest()
        answer = self._cache.get(key)
        for lane in self._lanes:
            answer = answer or await lane.ask({"rules": rules, "own": own})
        if answer is None:  # also where it waited too long for a processor: the verdict is not kept
            raise GrammarError("takes too long, or too much memory, to compile; make it smaller", grammar.field)
        self._keep(key, answer)
        if "grammar" in answer:
            return str(answer["grammar"])
        error = str(answer["error"])
        field = grammar.field if answer["is_own"] else grammar.field_of(error)
        raise GrammarError(f"{_reason(error)}{grammar.place_of(error)}; change or leave out what it names", field)

    def close(self) -> None:
        """End the processes. May be called twice."""
        for lane in self._lanes:
            lane.close()

    def _keep(self, key: str, answer: dict[str, Any]) -> None:
        if key not in self._cache:
            self._num_cached_chars += len(answer.get("grammar", ""))
        self._cache[key] = answer
        self._cache.move_to_end(key)
        while len(self._cache) > _MAX_CACHED or self._num_cached_chars > _MAX_CACHED_CHARS:
            self._num_cached_chars -= len(self._cache.popitem(last=False)[1].get("grammar", ""))


def _reason(error: str) -> str:
    """Llguidance's message in a line, without its place in the text, which the client does not know."""
    if error.startswith("NoExtension"):
        return "no text fulfils it"
    lines = error.splitlines()
    head = re.sub(r"^at \d+\(\d+\): ", "", lines[0]).partition(";")[0].removeprefix("failed to compile JSON schema: ")
    detail = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return "cannot be followed: " + public_text(f"{head[:200]} {detail[:100]}".strip())


class _Lane:
    """One process and the thread that waits for it."""

    def __init__(self, setup: dict[str, Any], cpu_s: float) -> None:
        self._process = LimitedProcess(
            "grammar_process.py", setup, cpu_s=cpu_s, memory_bytes=MEMORY_BYTES, wall_s=_WALL_S, nice=NICE
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")

    async def ask(self, request: object) -> dict[str, Any] | None:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._process.ask, request)

    def close(self) -> None:
        self._process.close()
