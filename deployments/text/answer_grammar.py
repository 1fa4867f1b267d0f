"""Answer grammar: one text that says all that an answer is held to: thinking, then calls, or content, or either."""

import re
from dataclasses import dataclass

from llguidance import regex_to_lark

from deployments.text.argument_grammar import Arguments
from deployments.text.call_forms import CallForm
from deployments.text.grammar_text import GrammarError, GrammarText, Marks, any_of, escaped
from deployments.text.prompts import ContentRule, Conversation

_HOLE = re.compile("(%INDEX|%NINE|%ARGS)")
_HOLES = {"%INDEX": "/[0-9]{1,4}/", "%NINE": "/[A-Za-z0-9]{9}/"}


@dataclass(frozen=True)
class Thinking:
    """What of its thinking the model may still do when the answer begins."""

    opens: str  # the mark that begins it; empty where it has begun in the prompt
    closes: str


def answer_grammar(
    content: ContentRule | None,
    conversation: Conversation,
    form: CallForm | None,
    thinking: Thinking | None,
    marks: Marks,
    is_loose: bool = False,
) -> GrammarText:
    """The rules, the first of which is `answer`. There is content that is asked for, or calls that are held.

    `form`: how the model writes calls. `thinking`: None where it cannot think, or has. `is_loose`: tools that are not
    strict are held to no schema. Raises GrammarError for what no grammar can say.
    """
    if conversation.tools and form is None:
        message = "it is not known how this model writes calls; leave them out, or have model.tool_format say it"
        raise GrammarError(message, "tools")
    grammar = GrammarText(marks)
    try:
        calls = _Calls(grammar, form, conversation, is_loose) if conversation.tools and form is not None else None
        if conversation.call_rule.must_call and calls is not None:
            body = calls.several()
        elif content is not None:
            wrapped = _wrapped(grammar, form, _content(grammar, content))
            body = any_of([calls.several(), wrapped]) if calls else wrapped
        else:
            assert calls is not None
            body = calls.among_text()
        grammar.define("answer", _after_thinking(grammar, thinking, body))
    except RecursionError:
        raise GrammarError("is nested too deeply; make it flatter", grammar.field) from None
    except (TypeError, AttributeError, KeyError):
        raise GrammarError("is no valid JSON Schema; correct it", grammar.field) from None
    return grammar


def _after_thinking(grammar: GrammarText, thinking: Thinking | None, body: str) -> str:
    if thinking is None:
        return body
    space = grammar.terminal(r"/[ \n]{1,4}/")
    thought = f"{grammar.until(thinking.closes)} {space}?"
    return f"{thought} {body}" if not thinking.opens else f"({grammar.literal(thinking.opens)} {thought})? {body}"


def _wrapped(grammar: GrammarText, form: CallForm | None, body: str) -> str:
    opens, closes = ("", "") if form is None else form.content
    return f"{grammar.literal(opens)} {body} {grammar.literal(closes)}".strip()


def _content(grammar: GrammarText, content: ContentRule) -> str:
    """The body of a rule that matches what `content` asks for."""
    grammar.field = content.field
    if content.kind == "json":
        return grammar.json(content.value)
    if content.kind == "regex":
        if (len(content.value) - len(content.value.rstrip("\\"))) % 2:
            raise GrammarError("ends with a backslash that escapes nothing; write two for one", content.field)
        return grammar.rule(f"/{regex_to_lark(content.value, '')}/")
    if content.kind == "choice":
        return grammar.rule(any_of(map(grammar.plain, content.value)))
    grammar.own_grammar = content.value
    return "@own"


class _Calls:
    """Writes rules for the calls that an answer may have."""

    def __init__(self, grammar: GrammarText, form: CallForm, conversation: Conversation, is_loose: bool) -> None:
        self._grammar, self._form = grammar, form
        self._is_single = conversation.is_single_call
        rule = conversation.call_rule
        self._calls = []
        for at, tool in enumerate(conversation.tools):
            function = tool["function"]
            name, is_strict = function["name"], function["name"] in rule.strict
            if rule.allowed is not None and name not in rule.allowed:
                continue
            grammar.field = f"tools.{at}.function.parameters"
            if form.dialect == "python" and not re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", name, re.ASCII):
                message = f"{name!r} is no name of a function in Python, in which this model writes calls; rename it"
                raise GrammarError(message, f"tools.{at}.function.name")
            schema = function.get("parameters") or {}
            arguments = Arguments(grammar, form, schema, is_strict, is_loose and not is_strict).body()
            self._calls.append((name, grammar.rule(arguments or '""')))

    def several(self) -> str:
        """One call or more, and nothing else."""
        grammar, form = self._grammar, self._form
        call = grammar.rule(self._one())
        between = grammar.literal(form.between)
        is_last = self._is_single or grammar.marks.ends_answer(form.call)
        more = "" if is_last else f"({between} {call})*"
        return grammar.rule(f"{grammar.literal(form.before)} {call} {more} {grammar.literal(form.after)}".strip())

    def among_text(self) -> str:
        """Text, with calls or without; what would be read as a call is held to the tools."""
        grammar, form = self._grammar, self._form
        if form.is_bare:
            text = grammar.free_text(form.banned, first=r"[^\s{\[]")
            return any_of([self.several(), f"{text}?"])
        opens = form.before or form.call.partition("%NAME")[0]
        first = grammar.marks.split(opens)[0]
        trigger = opens.strip().partition("%LF")[0].partition("\n")[0]
        if any(form.content):
            text = f"{grammar.literal(form.content[0])} {grammar.free_text([escaped(trigger), *form.banned])}"
            closes = form.content[1] if grammar.marks.partition(form.content[1])[1] else ""  # else it is in the text
            return any_of([self.several(), f"{text} {grammar.literal(closes)}"])
        times = "?" if self._is_single else "*"
        if isinstance(first, int):
            inner = [escaped(form.inner)] if form.inner else []
            text = grammar.free_text([escaped(trigger), *inner, *form.banned])
            return f"({text}? {self.several()}){times} {text}?"
        return self._behind_text(form.inner or trigger, times)

    def _behind_text(self, trigger: str, times: str) -> str:
        """The same where no token begins a call: any text up to the trigger is text, and then it is a call."""
        grammar, form = self._grammar, self._form
        head = grammar.rule(f"/(?s:.*){escaped(trigger)}/", "[lazy]")
        before = "" if form.inner else form.before
        calls = []
        for name, arguments in self._calls:
            whole = before + form.call if not form.inner else form.call[form.call.index(form.inner) :]
            calls.append(grammar.rule(f"{head} {self._call(whole[len(trigger) :], name, arguments)}"))
        call = any_of(calls)
        if not form.inner and form.before and not self._is_single:
            call = f"{call} ({grammar.literal(form.between)} {self._one()})*"
        after = "" if form.inner else grammar.literal(form.after)
        return f"({call} {after}){times} {grammar.free_text()}?"

    def _one(self) -> str:
        """A call of any of the tools, and nothing around it."""
        return any_of(self._grammar.rule(self._call(self._form.call, *one)) for one in self._calls)

    def _call(self, text: str, name: str, arguments: str) -> str:
        parts = _HOLE.split(text.replace("%NAME", name))
        return " ".join(
            self._grammar.literal(part) if at % 2 == 0 else _HOLES.get(part, arguments) for at, part in enumerate(parts)
        ).strip()
