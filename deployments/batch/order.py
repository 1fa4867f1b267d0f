"""The order in which rows go to gangs: by shared prefix, prompts mixed with long answers, the longest before the end.

Pure: shapes of rows in, numbers of rows out. What comes out does not change any answer, only how fast they come:

- Rows whose prompts begin alike follow each other, on one gang, while their blocks are in its cache.
- Of what is left, a gang takes from two ends: rows of much prompt for each token of answer, and rows of little. The
  mixture in the gang is then that of the whole job: neither only prompts, nor only decoding. (BlendServe, 2411.16102)
- When the input has ended and little is left for each slot, the longest answers go first: the last one ends sooner.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from deployments.api.bodies import GenerationBody
from deployments.text.prompts import Conversation, Prompt

UNLIMITED = 1024  # tokens to expect of an answer that nothing limits, where the config says no model.max_model_len
CHARS_PER_TOKEN = 4  # of a text that nobody has tokenized yet
_PREFIX_TOKENS = 64  # rows that share as many are a group: four blocks of 16
_KEY_TOKENS = 128  # of a prompt; those of a group are sorted by so many
_FIRST_SURROGATE = 0xD800  # characters from here on are none; two ids may look alike, which costs little
_HYSTERESIS = 4  # rows: how far the mixture may be off before a gang turns to the other end
_TAIL = 2  # answers of the longest kind that each slot still has time for, when the end begins


class Shape(NamedTuple):
    """What is known of a row before it is tokenized. Lengths are guesses, in tokens."""

    number: int  # of the row
    key: str  # how its first prompt begins, ids as characters; equal keys begin alike
    prompt_tokens: int
    max_output_tokens: int


def shape_of(number: int, body: GenerationBody, max_model_len: int) -> Shape:
    """The shape of a row; `max_model_len`, in tokens, stands for answers that may be as long as they like."""
    prompts = body.prompts
    lengths = [len(one) if isinstance(one, list) else len(_text(one)) // CHARS_PER_TOKEN + 1 for one in prompts]
    limit = body.token_limit[1]
    if limit is None:
        limit = body.default_max_tokens or max(1, max_model_len - max(lengths))
    return Shape(number, _key(prompts[0]), sum(lengths), limit * body.n * len(prompts))


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, Conversation):
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
    return prompt if isinstance(prompt, str) else ""


def _key(prompt: Prompt) -> str:
    if isinstance(prompt, list):
        return "".join(chr(token % _FIRST_SURROGATE) * CHARS_PER_TOKEN for token in prompt[:_KEY_TOKENS])
    return _text(prompt)[: _KEY_TOKENS * CHARS_PER_TOKEN]


@dataclass
class _Group:
    """Rows whose prompts begin alike, in the order of their prompts."""

    rows: deque[Shape]
    shared_tokens: int  # of a prompt: they are computed for the first row only
    density: float  # tokens of prompts to compute for each token of answers


@dataclass
class _Gang:
    """What a gang takes from."""

    from_prompts: bool = True  # the end it takes from: much prompt, or much answer
    surplus: float = 0.0  # tokens of prompts that it has been given beyond the job's own mixture
    current: dict[bool, str] = field(default_factory=dict)  # by end: the group it is at


class Order:
    """Rows that wait for a gang. `add` them, and `take` what a gang is to compute next."""

    def __init__(self, num_slots: int) -> None:
        """`num_slots`: sequences that all gangs run at once."""
        self._num_slots = num_slots
        self._groups: dict[str, _Group] = {}
        self._fresh: deque[str] = deque()  # names of groups that no gang has begun, much prompt first
        self._is_end = False
        self._longest = 1  # tokens of the longest answer
        self._tail: deque[Shape] | None = None  # once the end is near: what is left, longest answers first
        self._owner: dict[str, int] = {}  # by group: the gang whose cache holds its prefix
        self._begun: defaultdict[int, list[str]] = defaultdict(list)  # by gang: groups that have got rows again
        self._gangs: defaultdict[int, _Gang] = defaultdict(_Gang)
        self._ratio = 1.0  # tokens of prompts to compute for each token of answers, of all that waits
        self._mean_prompt = 1.0
        self._num_rows = 0
        self._output_tokens = 0

    def __len__(self) -> int:
        return self._num_rows

    def add(self, shapes: Iterable[Shape], is_end: bool = False) -> None:
        """Rows that come behind those that wait already. `is_end`: no more will come, but for rows that come back."""
        self._is_end = self._is_end or is_end
        waiting = [*self._waiting(), *shapes]
        by_name: defaultdict[str, list[Shape]] = defaultdict(list)
        for shape in waiting:
            by_name[shape.key[: _PREFIX_TOKENS * CHARS_PER_TOKEN]].append(shape)
        self._groups = {name: _group(rows) for name, rows in by_name.items()}
        self._owner = {name: gang for name, gang in self._owner.items() if name in self._groups}
        self._fresh = deque(name for name in self._by_density() if name not in self._owner)
        self._begun.clear()
        for name, gang in self._owner.items():
            self._begun[gang].append(name)
        self._num_rows, self._output_tokens = len(waiting), sum(shape.max_output_tokens for shape in waiting)
        prompts = sum(_to_compute(group, shape) for group in self._groups.values() for shape in group.rows)
        self._ratio = prompts / max(1, self._output_tokens)
        self._mean_prompt = prompts / max(1, len(waiting))
        self._longest = max((shape.max_output_tokens for shape in waiting), default=1)
        self._tail = None

    def take(self, gang: int, count: int) -> list[int]:
        """The numbers of up to `count` rows that a gang computes next, in this order."""
        if self._tail is None and self._is_end and self._output_tokens <= _TAIL * self._longest * self._num_slots:
            self._tail = self._longest_first()
        taken: list[int] = []
        while len(taken) < count and self._num_rows:
            shape = self._next(gang) if self._tail is None else self._tail.popleft()
            self._num_rows -= 1
            self._output_tokens -= shape.max_output_tokens
            taken.append(shape.number)
        return taken

    def pull(self, number: int) -> None:
        """Take one row that waits, out of turn."""
        left = [shape for shape in self._waiting() if shape.number != number]
        self._groups, self._tail = {}, None
        self.add(left)

    def forget(self, gang: int) -> None:
        """The gang's cache is lost: no group is tied to it."""
        self._owner = {name: owner for name, owner in self._owner.items() if owner != gang}

    def _waiting(self) -> list[Shape]:
        if self._tail is not None:
            return list(self._tail)
        return [shape for group in self._groups.values() for shape in group.rows]

    def _longest_first(self) -> deque[Shape]:
        """All rows, by powers of two of their answers' length: rows of about one length stay with their group."""
        rows = [shape for name in self._by_density() for shape in self._groups[name].rows]
        return deque(sorted(rows, key=lambda shape: -shape.max_output_tokens.bit_length()))

    def _next(self, number: int) -> Shape:
        gang = self._gangs[number]
        if abs(gang.surplus) > _HYSTERESIS * self._mean_prompt:
            gang.from_prompts = gang.surplus < 0
        name = gang.current.get(gang.from_prompts)
        if name not in self._groups:
            name = gang.current[gang.from_prompts] = self._open(number, gang.from_prompts)
        group = self._groups[name]
        self._owner[name] = number
        shape = group.rows.popleft()
        if not group.rows:
            del self._groups[name]
        gang.surplus += _to_compute(group, shape) - self._ratio * shape.max_output_tokens
        return shape

    def _open(self, gang: int, from_prompts: bool) -> str:
        """The next group from an end: one that this gang has begun, else one that nobody has, else the largest."""
        begun = self._begun[gang]
        while begun:
            if (name := begun.pop()) in self._groups:
                return name
        while self._fresh:
            if (name := self._fresh.popleft() if from_prompts else self._fresh.pop()) in self._groups:
                return name
        return max(self._groups, key=lambda name: len(self._groups[name].rows))

    def _by_density(self) -> list[str]:
        return sorted(self._groups, key=lambda name: -self._groups[name].density)


def _group(rows: list[Shape]) -> _Group:
    rows = sorted(rows, key=lambda shape: (shape.key, shape.number))
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(rows[0].key, rows[-1].key, strict=False))
    group = _Group(deque(rows), sum(1 for _ in alike) // CHARS_PER_TOKEN if len(rows) > 1 else 0, 0.0)
    outputs = sum(shape.max_output_tokens for shape in rows)
    group.density = (group.shared_tokens + sum(_to_compute(group, shape) for shape in rows)) / max(1, outputs)
    return group


def _to_compute(group: _Group, shape: Shape) -> int:
    return max(1, shape.prompt_tokens - group.shared_tokens)
