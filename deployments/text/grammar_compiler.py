"""Grammar compiler: finds out in limited processes whether a grammar can be followed, before a request is let in."""

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from actors.decisions.grammar import LIMITS
from deployments.text.grammar_text import GrammarBusy, GrammarError, GrammarText, Marks
from deployments.text.limited_process import LimitedProcess
from deployments.text.prompts import public_text

QUICK_CPU_S = 0.25  # nearly all grammars take less than 0.02 s
SLOW_CPU_S = 2.0
MEMORY_BYTES = 512 * 1024 * 1024
NICE = 19  # behind everything that answers
_WALL_S = 60.0  # so far behind, it may wait for a processor
_MAX_CACHED = 4096
_MAX_CACHED_CHARS = 16 * 1024 * 1024
# what the process answers, and "place" with its error; or "is_dear": it would take more time or memory than there is
Verdict = dict[str, Any]


class GrammarCompiler:
    """Used in the event loop's thread. What takes long moves to a second process, behind which nobody else waits."""

    def __init__(self, marks: Marks, vocab_size: int) -> None:
        """`vocab_size`: ids of the tokenizer, those of `marks` among them."""
        setup = {
            "vocab_size": vocab_size,
            "special": [[token_id, text] for text, token_id in marks.ids.items()],
            "ends": sorted(marks.ends),
            "limits": LIMITS,  # as on the ranks
        }
        self._making = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammars-made")
        self._lanes = [_Lane(setup, cpu_s) for cpu_s in (QUICK_CPU_S, SLOW_CPU_S)]
        self._cache: OrderedDict[str, Verdict] = OrderedDict()
        self._num_cached_chars = 0

    async def made(self, make: Callable[[], GrammarText]) -> GrammarText:
        """What `make` gives, in another thread: of large schemas it takes milliseconds."""
        return await asyncio.get_running_loop().run_in_executor(self._making, make)

    async def compile(self, grammar: GrammarText) -> str:
        """The text that ranks follow.

        Raises GrammarError, with the field at fault, where it cannot be followed; GrammarBusy where too many wait.
        """
        rules, key = await asyncio.get_running_loop().run_in_executor(self._making, _rendered, grammar)
        verdict = self._cache.get(key)
        for lane in self._lanes:
            if verdict is None or ("is_dear" in verdict and key not in self._cache):
                verdict = await lane.ask(rules, grammar, partial(self._cache.get, key))
        if verdict is None:  # it waited too long for a processor
            raise GrammarBusy
        self._keep(key, verdict)
        if "is_dear" in verdict:
            raise GrammarError("takes too long, or too much memory, to compile; make it smaller", grammar.field)
        if "grammar" in verdict:
            return str(verdict["grammar"])
        error = str(verdict["error"])
        field = grammar.field if verdict["is_own"] else grammar.field_of(error)
        raise GrammarError(f"{_reason(error)}{verdict['place']}; change or leave out what it names", field)

    def close(self) -> None:
        """End the processes. May be called twice."""
        self._making.shutdown(wait=False, cancel_futures=True)
        for lane in self._lanes:
            lane.close()

    def _keep(self, key: str, verdict: Verdict) -> None:
        if key not in self._cache:
            self._num_cached_chars += len(verdict.get("grammar", ""))
        self._cache[key] = verdict
        self._cache.move_to_end(key)
        while len(self._cache) > _MAX_CACHED or self._num_cached_chars > _MAX_CACHED_CHARS:
            self._num_cached_chars -= len(self._cache.popitem(last=False)[1].get("grammar", ""))


def _reason(error: str) -> str:
    """Llguidance's message in a line, without its place in the text, which the client does not know."""
    if error.startswith("NoExtension"):
        return "no text fulfils it"
    lines = error.splitlines()
    head = (
        re.sub(r"^(?:at )?\d+\(\d+\): ", "", lines[0]).partition(";")[0].removeprefix("failed to compile JSON schema: ")
    )
    detail = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return "cannot be followed: " + public_text(f"{head[:200]} {detail[:100]}".strip())


def _rendered(grammar: GrammarText) -> tuple[str, str]:
    """The rules, and under what their verdict is kept."""
    rules = grammar.render("answer")
    return rules, hashlib.sha256(f"{rules}\0{grammar.own_grammar}".encode()).hexdigest()


class _Lane:
    """One process and the thread that waits for it."""

    def __init__(self, setup: dict[str, Any], cpu_s: float) -> None:
        self._process = LimitedProcess(
            "grammar_process.py", setup, cpu_s=cpu_s, memory_bytes=MEMORY_BYTES, wall_s=_WALL_S, nice=NICE
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._most_waiting = int(_WALL_S / cpu_s)
        self._num_waiting = 0

    async def ask(self, rules: str, grammar: GrammarText, kept: Callable[[], Verdict | None]) -> Verdict | None:
        """What the process finds, or what is `kept` by then; None where it got no processor. Raises GrammarBusy."""
        if self._num_waiting >= self._most_waiting:
            raise GrammarBusy
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._find, rules, grammar, kept)
        finally:
            self._num_waiting -= 1

    def _find(self, rules: str, grammar: GrammarText, kept: Callable[[], Verdict | None]) -> Verdict | None:
        if (verdict := kept()) is not None:  # of the same grammar, that waited before this one
            return verdict
        verdict = self._process.ask({"rules": rules, "own": grammar.own_grammar})
        if verdict is None:
            return {"is_dear": True} if self._process.reached_limit else None
        if "error" in verdict:
            verdict["place"] = grammar.place_of(str(verdict["error"]))
        return verdict

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)  # what waits would start the process anew
        self._process.close()
