"""Grammar text: rules in llguidance's Lark dialect, in which a model's marks are the ids that they are to the model."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

MAX_CHARS = 1024 * 1024  # of one grammar; a schema of 4 MB takes seconds to compile
JSON_SPACE = r"[\x20\x09]{1,2}|\x0D?\x0A[\x20\x09]{0,20}"
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
_PLACE = re.compile(r"\b(\d+)\(\d+\):")  # of llguidance's messages: line(column)


class GrammarError(ValueError):
    """What was asked cannot be made sure of; the message says why, and may be shown to the client (as 400)."""

    def __init__(self, message: str, field: str) -> None:
        """`field`: of the request, that is at fault."""
        super().__init__(f"{field}: {message}")
        self.field = field


class GrammarBusy(Exception):
    """It could not be found out in time whether a grammar can be followed; another time it may."""


class Marks:
    """The control tokens of a model: which of its marks are one id, and which ids end an answer."""

    def __init__(self, ids: Mapping[str, int], ends: frozenset[int]) -> None:
        """`ids`: of special tokens, and of added ones in angle brackets, by their text: llguidance takes them alike."""
        self.ids = dict(ids)
        self.ends = ends
        longest_first = sorted(filter(None, ids), key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    @classmethod
    def of(cls, tokenizer: Any, ends: frozenset[int]) -> "Marks":
        """Those of one of Transformers' tokenizers."""
        added = tokenizer.added_tokens_decoder.items()
        ids = {
            token.content: token_id
            for token_id, token in added
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        }
        return cls(ids, ends)

    def split(self, text: str) -> list[str | int]:
        """The text in pieces: ids of marks, and the text between them."""
        pieces = self._pattern.split(text) if self._pattern else [text]
        return [self.ids[piece] if at % 2 else piece for at, piece in enumerate(pieces) if piece]

    def partition(self, text: str) -> tuple[str, str, str]:
        """What stands before the first mark that is one id, the mark, and what stands behind it."""
        before, *rest = self._pattern.split(text, maxsplit=1) if self._pattern else [text]
        return (before, rest[0], rest[1]) if rest else (text, "", "")

    def ends_answer(self, text: str) -> bool:
        """Whether a mark in the text is an id that ends an answer."""
        return any(piece in self.ends for piece in self.split(text))


class GrammarText:
    """Collects rules, and knows for which field of the request each was written. Raises GrammarError when too long."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.field = ""  # what the next rules are written for
        self.own_grammar: tuple[str, str] | None = None  # the client's, which rules call @own, and its field
        self.num_looks = 0  # how many parts of schemas were looked at to write the rules
        self._rules: list[tuple[str, str]] = []  # a rule, and its field
        self._names: dict[str, str] = {}
        self._num_chars = 0

    def rule(self, body: str, options: str = "") -> str:
        """The name of a rule with this body; the same body has the same name."""
        return self._add("r", body, options)

    def terminal(self, body: str) -> str:
        """The name of a terminal, which is one regular expression."""
        return self._add("T", body, "")

    def declare(self) -> str:
        """The name of a rule that `define` gives its body: it may lead back to itself."""
        self._names[f"declared {len(self._names)}"] = name = f"r{len(self._names)}"
        return name

    def define(self, name: str, body: str) -> None:
        """The body of a declared rule."""
        self._append(f"{name}: {body}")

    def literal(self, text: str) -> str:
        """Exactly this text, up to a mark that ends the answer; %LF is a line break or nothing."""
        parts = []
        for piece in self.marks.split(text):
            if isinstance(piece, int):
                if piece in self.marks.ends:  # end-of-sequence is never in a grammar: it is allowed where one may end
                    break
                parts.append(f"<[{piece}]>")
            else:
                plain = piece.split("%LF")
                parts.append(' "\\n"? '.join(self.plain(one) if one else "" for one in plain))
        return " ".join(parts)

    def plain(self, text: str) -> str:
        """Exactly this text, and none of it as a control token."""
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # which Lark's strings cannot have

    def until(self, mark: str, first: str = "") -> str:
        """Any text up to the first `mark`, and the mark. `first`: a class that its first character is of."""
        mark, break_, rest = mark.partition("%LF")
        _, token, after = self.marks.partition(mark)
        if not token:
            return f"{self.rule(f'/{first}(?s:.*){escaped(mark)}/', '[lazy]')} {self.literal(break_ + rest)}"
        text = self.terminal(f"/{first or '(?s:.)'}(?s:.*)/")
        return f"{text}{'' if first else '?'} {self.literal(token + after + break_ + rest)}"

    def free_text(self, banned: Iterable[str] = (), first: str = "(?s:.)") -> str:
        """Text that is not empty, has no control tokens, and spells none of the banned regular expressions."""
        without = "|".join(banned)
        return self.terminal(f"/{first}(?s:.*)/" + (f" & ~/(?s:.*)({without})(?s:.*)/" if without else ""))

    def json(self, schema: object, white_space: str = JSON_SPACE) -> str:
        """JSON that obeys a schema: an object of keywords, or true.

        `white_space`: at each place where it may be; bounded, so that a model cannot write blanks for ever.
        """
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise GrammarError("is no JSON Schema; send an object", self.field)
        if "x-guidance" in schema:
            raise GrammarError("x-guidance is this server's own; leave it out", self.field)
        try:
            text = msgspec.json.encode({**schema, "x-guidance": {"whitespace_pattern": white_space}}).decode()
        except RecursionError:
            raise GrammarError("is nested too deeply; make it flatter", self.field) from None
        return self.rule(f"%json {text}")

    def sequence(self, members: list[tuple[str, bool]], comma: str) -> str:
        """Members in their order, those that need not be there left out; commas only between two of them."""
        rest = ""  # what may follow a member
        alone = ""  # from here on, when nothing has been written yet
        for body, is_required in reversed(members):
            followed = f"{body} {rest}".strip()
            if is_required:
                alone = self.rule(followed)
            else:
                alone = self.rule(f"{followed} | {alone}") if alone else f"{self.rule(followed)}?"
            more = f"({comma} {body})" + ("" if is_required else "?")
            rest = self.rule(f"{more} {rest}".strip())
        return alone

    def render(self, start: str) -> str:
        """The whole text, whose first rule is `start`."""
        return "\n".join([f"start: {start}", *(text for text, _ in self._rules)])

    def field_of(self, message: str) -> str:
        """The field whose rule llguidance complains of; that of the client's own grammar where no line is told."""
        return self._rule_of(message)[1]

    def place_of(self, message: str) -> str:
        """Where in its schema the keyword stands that llguidance names, in words; empty where it names none."""
        schema = self._rule_of(message)[0].partition("%json ")[2]
        named = re.findall(r'"([^"]+)"', message.partition("\n")[0])
        wanted = [*named, *(word for word in ("oneOf", "allOf", "format", "pattern") if word in message)]
        path = next((found for word in wanted if schema and (found := _path(json.loads(schema), word))), None)
        return f" (at {'.'.join(path)[:200]})" if path else ""

    def _rule_of(self, message: str) -> tuple[str, str]:
        """The rule whose line a message tells, and its field; no rule and the last field where it tells none."""
        place = _PLACE.search(message)
        index = int(place[1]) - 2 if place else -1  # before them stands `start`
        return self._rules[index] if 0 <= index < len(self._rules) else ("", self.field)

    def _add(self, kind: str, body: str, options: str) -> str:
        key = f"{kind}{options} {body}"
        if key not in self._names:
            self._names[key] = f"{kind}{len(self._names)}"
            self._append(f"{self._names[key]}{options}: {body}")
        return self._names[key]

    def _append(self, text: str) -> None:
        self._num_chars += len(text)
        if self._num_chars > MAX_CHARS:
            raise GrammarError(f"makes a grammar of more than {MAX_CHARS} characters; send less", self.field)
        self._rules.append((text, self.field))


def _path(schema: Any, keyword: str) -> list[str] | None:
    """The way to the first place of a keyword in a schema."""
    members = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    for name, part in members:
        if name == keyword:
            return [str(name)]
        if (rest := _path(part, keyword)) is not None:
            return [str(name), *rest]
    return None


def escaped(text: str) -> str:
    """A regular expression that matches this text, as it stands between two slashes."""
    return _SPECIAL.sub(lambda mark: "\\" + mark[0], text).replace("\n", "\\n")


def any_of(bodies: Iterable[str]) -> str:
    """One of these."""
    return "(" + " | ".join(bodies) + ")"
