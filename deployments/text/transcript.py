"""Transcript: turns one sequence's token ids into text as they come, and cuts it at the first stop string."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from actors.words.messages import FinishReason, TokenLogprobs

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character
_MAX_UNSETTLED = 16  # ids; a character has at most four bytes, so a longer tail is not half a character
_CONTEXT = 8  # ids of a prompt that decide how an answer to it begins: with a space, or with half a character


class Decoder:
    """Token ids → text, in pieces that join to what decoding all ids at once gives, and never end in half a character.

    Decodes a window of the last few ids, so that the work a token is constant. The window begins where the text was
    complete, because a token's text depends on what stands before it (spaces at the start, bytes of one character).
    """

    def __init__(
        self, decode: Callable[[list[int]], str], special_texts: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """`decode` gives the text of ids; those of special tokens, whose names are given, have none and are skipped."""
        self._decode = decode
        self.special_texts = special_texts
        self._window: list[int] = []
        self._num_settled_ids = 0  # of the window: up to where its text was complete
        self._num_sent = 0  # characters of the window's text

    def push(self, token_id: int) -> str:
        """The text that this id adds, except a tail that may still become a character."""
        if token_id in self.special_texts:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_complete = len(text.rstrip(_REPLACEMENT))
        if num_complete == len(text):
            piece = text[self._num_sent :]
            self._move_window(self._num_settled_ids, num_unsent=0)
            return piece
        if len(self._window) - self._num_settled_ids > _MAX_UNSETTLED:
            # These bytes are no text: they are shown as replacement characters.
            num_complete = max(num_complete, len(text) - 3, self._num_sent)
            piece = text[self._num_sent : num_complete]
            self._move_window(len(self._window) - 4, num_unsent=len(text) - num_complete)
            return piece
        piece = text[self._num_sent : num_complete]
        self._num_sent = max(self._num_sent, num_complete)
        return piece

    def flush(self) -> str:
        """The rest, at the end of the sequence: a half character that never became a whole one."""
        return self.finish([])

    def finish(self, token_ids: Sequence[int]) -> str:
        """The text that the last ids add, and the rest: as pushing each would give, in one go."""
        self._window += [token_id for token_id in token_ids if token_id not in self.special_texts]
        text = self._decode(self._window) if self._window else ""
        piece = text[self._num_sent :]
        self._num_sent = len(text)
        return piece

    def _move_window(self, first: int, num_unsent: int) -> None:
        self._window = self._window[first:]
        self._num_settled_ids = len(self._window)
        self._num_sent = max(0, len(self._decode(self._window)) - num_unsent)


class StopStrings:
    """Lets text pass up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: list[str], shows_stop: bool = False) -> None:
        """`shows_stop`: the text that may be shown ends with the stop string, not before it."""
        self._stops = stops
        self._shows_stop = shows_stop
        self._first_chars = frozenset(stop[0] for stop in stops)
        self.are_none = not stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._num_exempt = 0  # characters of the held text: a stop string that ends within them does not count
        self.is_found = False

    def push(self, text: str, is_exempt: bool = False) -> str:
        """The text that may be shown now; empty once a stop string was found.

        Of several the one that is complete first counts, and of those that end together the longest: however the text
        is cut into pieces. One that ends in exempt text does not count; one that ends after it does, though it began
        there.
        """
        if self.is_found or not self._stops:
            return "" if self.is_found else text
        self._held += text
        if is_exempt:
            self._num_exempt = len(self._held)
        found = [
            (index + len(stop), index)
            for stop in self._stops
            if (index := self._held.find(stop, max(0, self._num_exempt - len(stop) + 1))) >= 0
        ]
        if found:
            self.is_found = True
            end, start = min(found)
            return self._release(end if self._shows_stop else start)
        return self._release(self._first_beginning())

    def flush(self) -> str:
        """The rest, at the end of the sequence."""
        return self._release(len(self._held))

    def _first_beginning(self) -> int:
        """Index from which the held text could become a stop string; its length where it could not."""
        for index in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            if self._held[index] in self._first_chars:
                tail = self._held[index:]
                if any(stop.startswith(tail) and stop != tail for stop in self._stops):
                    return index
        return len(self._held)

    def _release(self, num_chars: int) -> str:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        self._num_exempt = max(0, self._num_exempt - num_chars)
        return text


@dataclass(frozen=True)
class ScoredToken:
    """A token whose log-probabilities were asked for, and where its text begins."""

    token_id: int
    offset: int  # characters of the sequence's text before it
    logprobs: TokenLogprobs | None  # None for the first token of a prompt


class Transcript:
    """What a client sees of one sequence: its text, how many ids it took, and why it ended."""

    def __init__(self, decoder: Decoder, stops: list[str], min_tokens: int = 0, shows_stop: bool = False) -> None:
        """A stop string that ends within the first `min_tokens` generated ids does not count.

        `shows_stop`: the text of the stop string or stop id is shown.
        """
        self._decoder = decoder
        self._shows_stop = shows_stop
        self._stops = StopStrings(stops, shows_stop)
        self._min_tokens = min_tokens
        self._num_decoded = 0  # characters
        self._num_shown = 0
        self._scored: deque[ScoredToken] = deque()  # tokens whose text is not shown yet
        self._specials: deque[tuple[int, str]] = deque()  # special tokens: characters before them, and their names
        self.num_tokens = 0  # generated ids, the stop id or those of the stop string included
        self.finish_reason: FinishReason | None = None

    def follow(self, prompt_ids: list[int]) -> None:
        """Decode what follows as a continuation of the prompt, which is not shown. Call it before the first `push`."""
        for token_id in prompt_ids[-_CONTEXT:]:
            self._decoder.push(token_id)

    def echo(self, prompt: str | None, prompt_ids: list[int], logprobs: list[TokenLogprobs] | None) -> str:
        """The prompt's text, shown first; decoded from its ids where `prompt` is None. Call it instead of `follow`.

        `logprobs` are those of the second id and on; None when they were not asked for.
        """
        decoded, offsets = "", []
        for token_id in prompt_ids:
            offsets.append(len(decoded))
            decoded += self._decoder.push(token_id)
        if logprobs is not None:
            self._scored.extend(map(ScoredToken, prompt_ids, offsets, [None, *logprobs]))
        text = decoded if prompt is None else prompt
        self._num_decoded = self._num_shown = len(text)
        return text

    def push(
        self, token_ids: list[int], finish_reason: FinishReason | None = None, logprobs: Sequence[TokenLogprobs] = ()
    ) -> str:
        """The text that these ids add. With "stop" the last id is the stop id, which has no text unless it is shown.

        When a stop string is found, `finish_reason` becomes "stop", and `num_tokens` counts up to the id that completed
        it; the ids after that are ignored.
        """
        text = self._push(token_ids, finish_reason, logprobs)
        self._num_shown += len(text)
        return text

    def with_specials(self, text: str) -> list[tuple[str, bool]]:
        """What `push` has just returned, in pieces, each with whether it is the name of a special token in between."""
        pieces, start = [], self._num_shown - len(text)
        at = start
        while self._specials and self._specials[0][0] <= self._num_shown:
            offset, name = self._specials.popleft()
            pieces += [(text[at - start : offset - start], False), (name, True)]
            at = offset
        return [*pieces, (text[at - start :], False)]

    def take_scored(self) -> list[ScoredToken]:
        """Tokens whose text has been shown, at least in part, since the last call; none that a stop string cut off."""
        is_whole = self.finish_reason is not None and not self._stops.is_found
        scored = []
        while self._scored and (is_whole or self._scored[0].offset < self._num_shown):
            scored.append(self._scored.popleft())
        return scored

    def _push(self, token_ids: list[int], finish_reason: FinishReason | None, logprobs: Sequence[TokenLogprobs]) -> str:
        hides_stop_id = finish_reason == "stop" and not self._shows_stop
        shown_ids = token_ids[:-1] if hides_stop_id else token_ids
        has_specials = not self._decoder.special_texts.keys().isdisjoint(shown_ids)
        if finish_reason and self._stops.are_none and not logprobs and not has_specials:
            self.num_tokens += len(token_ids)  # nothing depends on where a token's text begins
            self.finish_reason = finish_reason
            return self._decoder.finish(shown_ids)
        text = ""
        for index, token_id in enumerate(shown_ids):
            if logprobs:
                self._scored.append(ScoredToken(token_id, self._num_decoded, logprobs[index]))
            self.num_tokens += 1
            if token_id in self._decoder.special_texts:
                self._specials.append((self._num_decoded, self._decoder.special_texts[token_id]))
            piece = self._decoder.push(token_id)
            self._num_decoded += len(piece)
            text += self._stops.push(piece, self._is_exempt)
            if self._stops.is_found:
                self.finish_reason = "stop"
                return text
        self.num_tokens += hides_stop_id
        if finish_reason:
            text += self._stops.push(self._decoder.flush(), self._is_exempt)
            self.finish_reason = "stop" if self._stops.is_found else finish_reason
            text += "" if self._stops.is_found else self._stops.flush()
        return text

    @property
    def _is_exempt(self) -> bool:
        return self.num_tokens <= self._min_tokens
