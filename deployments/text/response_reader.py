"""Reads one answer as it comes: parts it into thinking, visible text and tool calls, however the text is cut."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

from deployments.text.call_candidate import CallCandidate
from deployments.text.response_format import CALLS, REASONING, ResponseFormat, kind_of
from deployments.text.text_flow import TextFlow
from deployments.text.tool_calls import CLOSE_THEMSELVES, CallIds, Schemas, ToolCall, read_calls

_SLICE = 512  # characters that are searched at once: what a mark costs does not grow with the answer
_MAX_MARK = 256  # characters: a longer text is none, so that what may become one is soon known to be none
_MATCH_S = 1.0  # for one search: patterns may come with a checkpoint
_MAX_SECOND_LOOKS = 16  # at text that an unfinished string had swallowed
_SLOW_CHARS = 16 * 1024  # of a call: reading it takes milliseconds


@dataclass(frozen=True)
class Delta:
    """What some text adds to an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class ResponseReader:
    """Used for one answer. Linear in its length; raises nothing, whatever the model writes."""

    def __init__(
        self, answer_format: ResponseFormat, prefix: str, tools: Schemas, call_ids: CallIds, is_single: bool = False
    ) -> None:
        """`prefix`: what the prompt has of the answer already, such as an opened thought. Without `tools` no calls.

        `is_single`: the answer is done with its first call.
        """
        fields = answer_format.template.fields.values()
        self._format, self._tools = answer_format, tools
        self._call_ids, self._is_single = call_ids, is_single
        self._opening = [one for one in fields if one.open_re is not None and kind_of(one) != CALLS]
        self._calls: list[ResponseTemplateField] = []
        implicit = answer_format.template.fields.get(answer_format.template.implicit or "")
        self._tail = implicit if implicit is not None and implicit.close_re is not None else None
        self._current: ResponseTemplateField | None = None  # the field that text goes to; None: content
        self._candidate: CallCandidate | None = None
        self._suspended: tuple[list[tuple[str, str]], list[str]] = ([], [])  # calls in a thought, and their text
        self._content, self._reasoning, self._new_calls = TextFlow(), TextFlow(), list[ToolCall]()
        self._text, self._pos, self._at = "", 0, 0  # unsettled text after one settled character; where it begins
        self._ahead: list[str] = []  # what comes behind it, in slices, the last one first
        self._hidden: deque[tuple[int, int]] = deque([(0, len(prefix))])
        self._num_second_looks = 0
        self.is_done = False  # what follows is ignored
        self._read(prefix)  # whose calls, if any, are those of an earlier answer
        self._take()
        if tools:
            self._calls = [one for one in fields if one.open_re is not None and kind_of(one) == CALLS]
            self._opening += self._calls

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought."""
        return self._current is not None and kind_of(self._current) == REASONING

    @property
    def is_slow(self) -> bool:
        """Whether the next text may take milliseconds, and so should be read in another thread."""
        return self._format.is_foreign or (self._candidate is not None and self._candidate.num_chars > _SLOW_CHARS)

    def go_on(self) -> None:
        """The answer goes on in the middle of a text of the prompt: white space that it begins with belongs to it."""
        self._content.is_after_mark = False

    def push(self, pieces: Iterable[tuple[str, bool]]) -> Delta:
        """What these pieces add: texts, each with whether it is a special token's, which clients do not see."""
        for text, is_hidden in pieces:
            if is_hidden:
                at = self._at + len(self._text)
                self._hidden.append((at, at + len(text)))
            for start in range(0, len(text), _SLICE):
                self._read(text[start : start + _SLICE])
        return self._take()

    def end(self) -> Delta:
        """What is left when nothing follows."""
        self._read("", is_end=True)
        calls, self._suspended = self._suspended[0], ([], [])
        if calls:
            self._reasoning.mark()
        self._add_calls(calls)
        self._content.end()
        self._reasoning.end()
        return self._take()

    def _take(self) -> Delta:
        calls, self._new_calls = tuple(self._new_calls), []
        return Delta(self._content.take(), self._reasoning.take(), calls)

    def _read(self, text: str, is_end: bool = False) -> None:
        self._ahead.append(text)
        while self._ahead and not self.is_done:
            self._text += self._ahead.pop()
            while not self.is_done and self._read_on(is_end and not self._ahead):
                pass
            if self._pos > 1:
                self._text, self._at, self._pos = self._text[self._pos - 1 :], self._at + self._pos - 1, 1

    def _read_on(self, is_end: bool) -> bool:
        """Read up to the next mark, or the end of the candidate; whether there was one."""
        return self._read_candidate(self._candidate, is_end) if self._candidate else self._read_text(is_end)

    def _read_text(self, is_end: bool) -> bool:
        """Show text up to the next mark; whether there was one."""
        found, held = self._next_mark(is_end)
        if found is None:
            self._show(len(self._text) if is_end else held)
            return False
        what, mark_field, match = found
        self._show(match.start())
        self._pos = match.end()
        if what == "tail" and self._suspended[0]:  # shown with the calls, should the thought go on
            self._suspended[1].append(self._visible(match[0], self._at + match.start()))
        elif what == "tail" and (self.is_thinking or not self._content.is_after_mark):
            self._pos = match.start()
            self._show(match.end())
        elif what == "open" and kind_of(mark_field) == CALLS:
            captures = {name: value for name, value in match.groupdict().items() if value is not None}
            self._candidate = CallCandidate(mark_field, captures, self._at + match.start(), match[0])
        elif what != "tail":
            self._resume_thought()
            self._content.mark()
            self._reasoning.mark()
            if self.is_thinking:  # what follows a thought begins anew
                self._text, self._at, self._pos = self._text[self._pos :], self._at + self._pos, 0
            self._current = mark_field if what == "open" else None
        return True

    def _next_mark(self, is_end: bool) -> tuple[tuple[str, ResponseTemplateField, Any] | None, int]:
        """The next mark, if it can no longer become another one; else up to where the text has none."""
        found, found_key, held = None, None, len(self._text)
        for what, mark_field, pattern in self._watched():
            match = self._search(pattern, is_end)
            if match is None or not (match[0] or match.partial or kind_of(mark_field) == CALLS or what == "close"):
                continue  # without text, it would be found again and again
            if not is_end and (match.partial or self._may_grow(mark_field, what, match)):
                held = min(held, match.start())
                continue
            key = (match.start(), -len(match[0]), what)
            if found_key is None or key < found_key:
                found, found_key = (what, mark_field, match), key
        if found is not None and found[2].start() >= held:
            found = None
        return found, held

    def _watched(self) -> list[tuple[str, ResponseTemplateField, Any]]:
        watched = []
        if self._current is not None:
            watched = [("close", self._current, self._current.close_re)] if self._current.close_re is not None else []
        opening = self._opening if self._current is None else self._calls if self.is_thinking else []
        watched += [("open", one, one.open_re) for one in opening]
        if self._tail is not None and (self._current is None or self._suspended[0]):
            watched.append(("tail", self._tail, self._tail.close_re))
        return watched

    def _search(self, pattern: Any, is_end: bool) -> Any:
        """The first match that is no longer than a mark may be; a partial one where the text may go on."""
        partial = {} if is_end else {"partial": True}
        start = self._pos
        try:
            while match := pattern.search(self._text, start, timeout=_MATCH_S, **partial):
                if len(match[0]) <= _MAX_MARK:
                    return match
                start = match.start() + 1
        except TimeoutError:  # a pattern of the checkpoint: from here on all is text
            self._opening, self._calls, self._tail = [], [], None
        return None

    def _may_grow(self, mark_field: ResponseTemplateField, what: str, match: Any) -> bool:
        """Whether a match at the end of the text could become longer, or go, with more of it."""
        if match.end() != len(self._text):
            return False
        if what == "open":
            literals, can_extend = mark_field.open_literals, mark_field.open_literal_can_extend
        else:
            literals, can_extend = mark_field.close_literals, mark_field.close_literal_can_extend
        if literals is None:
            ours = not self._format.is_foreign
            return not (ours and match.re.pattern.endswith(">"))  # which stop at the first ">"
        return bool(can_extend)

    def _read_candidate(self, candidate: CallCandidate, is_end: bool) -> bool:
        """Read on to where the candidate ends; whether it has."""
        closing = candidate.field.close_re
        if closing is None:
            end = candidate.add(self._text[self._pos :])
            if end is None and not is_end:
                self._pos = len(self._text)
                return False
            num_after = 0 if end is None else len(self._text) - self._pos - end
            self._settle(candidate, "", num_after)
            return True
        match = self._search(closing, is_end)
        if match is None or (not is_end and (match.partial or self._may_grow(candidate.field, "close", match))):
            held = len(self._text) if match is None else match.start()
            candidate.add(self._text[self._pos : held])
            self._pos = held
            if is_end:
                self._settle(candidate, "", 0)
            return is_end
        candidate.add(self._text[self._pos : match.start()])
        self._pos = match.end()
        if candidate.is_in_string:
            candidate.add(match[0])
            candidate.first_close = candidate.first_close or candidate.num_chars
        else:
            self._settle(candidate, match[0], 0)
        return True

    def _settle(self, candidate: CallCandidate, closing: str, num_after: int) -> None:
        """The candidate has ended, `num_after` characters before the end of its body: it is a call, or text."""
        self._candidate = None
        whole = "".join(candidate.body)
        body = whole[: len(whole) - num_after]
        is_whole = bool(closing) or candidate.field.content in CLOSE_THEMSELVES
        calls = read_calls(candidate.field, body, candidate.captures, self._tools) if is_whole else None
        raw, again = candidate.opening + body + closing, whole[len(body) :]
        if calls is None and candidate.first_close and self._num_second_looks < _MAX_SECOND_LOOKS:
            self._num_second_looks += 1
            num_first = len(candidate.opening) + candidate.first_close
            raw, again = raw[:num_first], raw[num_first:] + again
        if closing or candidate.field.close_re is not None:
            rest = self._text[self._pos :]
        else:
            rest = ""  # it is in the body, behind its end
        shown = self._visible(raw, candidate.start)
        rest = again + rest
        self._ahead += [rest[at : at + _SLICE] for at in range(_SLICE, len(rest), _SLICE)][::-1]
        self._text, self._at, self._pos = raw[-1:] + rest[:_SLICE], candidate.start + len(raw) - 1, 1
        if calls is None:
            self._add_text(shown)
        elif self.is_thinking:
            self._suspended[0].extend(calls)
            self._suspended[1].append(shown)
        else:
            self._add_calls(calls)

    def _add_calls(self, calls: list[tuple[str, str]]) -> None:
        if not calls or self.is_done:
            return
        self._content.mark()
        for name, arguments in calls[:1] if self._is_single else calls:
            self._new_calls.append(ToolCall(self._call_ids.next(name), name, arguments))
        self.is_done = self._is_single

    def _show(self, end: int) -> None:
        """Show the text up to index `end`."""
        if end > self._pos:
            self._add_text(self._visible(self._text[self._pos : end], self._at + self._pos))
            self._pos = end

    def _add_text(self, text: str) -> None:
        if not self.is_thinking:
            self._content.push(text)
        elif self._suspended[0] and not text.strip():
            self._suspended[1].append(text)
        else:
            self._resume_thought()
            self._reasoning.push(text)

    def _resume_thought(self) -> None:
        """Calls in a thought that goes on after them were only thought of."""
        (_, texts), self._suspended = self._suspended, ([], [])
        for text in texts:
            self._reasoning.push(text)

    def _visible(self, text: str, at: int) -> str:
        """The text, which begins at character `at` of the answer, without special tokens and the prompt."""
        shown, pos, end = [], at, at + len(text)
        while self._hidden and self._hidden[0][0] < end:
            start, stop = self._hidden[0]
            shown.append(text[pos - at : max(pos, start) - at])
            pos = max(pos, min(stop, end))
            if stop > end:
                break
            self._hidden.popleft()
        return "".join([*shown, text[pos - at :]])
