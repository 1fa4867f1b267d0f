"""Compiled grammars of a rank: threads compile each text once, however many rows follow it, and keep the latest."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llguidance import LLTokenizer

from actors.decisions.grammar import GrammarMatcher, compiled
from actors.tensors.sampling.tokenizer_file import read_vocabulary

_THREADS = 4
_MAX_KEPT, _MAX_KEPT_CHARS = 64, 4 * 1024 * 1024

NewMatcher = Callable[[Sequence[int]], GrammarMatcher]  # of the ids that end a row's text


class NoVocabularyError(Exception):
    """The tokenizer cannot be read: no grammar can be followed."""


@dataclass(eq=False)
class Compilation:
    """A grammar that is compiled, or will be."""

    grammar: str
    new_matcher: "Future[NewMatcher]"
    num_rows: int = 0  # that follow it, or wait for it


class CompiledGrammars:
    """One thread uses it."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar-compile")
        self._vocabulary: Future[LLTokenizer]
        self._kept: OrderedDict[str, Compilation] = OrderedDict()  # the latest last
        self._num_chars = 0  # of those kept

    def load(self, folder: Path) -> None:
        """Begin to read the tokenizer."""
        self._vocabulary = self._pool.submit(self._read, folder)

    def open(self, grammar: str) -> Compilation:
        """Begin to compile what a row follows, unless that has begun before. `close` must follow."""
        one = self._kept.get(grammar)
        if one is None:
            one = self._kept[grammar] = Compilation(grammar, self._pool.submit(self._compile, grammar))
            self._num_chars += len(grammar)
        self._kept.move_to_end(grammar)
        one.num_rows += 1
        while len(self._kept) > 1 and (len(self._kept) > _MAX_KEPT or self._num_chars > _MAX_KEPT_CHARS):
            self._forget(next(iter(self._kept)))  # its rows have it still
        return one

    def close(self, one: Compilation) -> None:
        """A row has ended. What has not begun to be compiled is not, when no row waits for it any more."""
        one.num_rows -= 1
        if not one.num_rows and one.new_matcher.cancel() and self._kept.get(one.grammar) is one:
            self._forget(one.grammar)

    def _forget(self, grammar: str) -> None:
        del self._kept[grammar]
        self._num_chars -= len(grammar)

    def _read(self, folder: Path) -> LLTokenizer:
        try:
            return read_vocabulary(folder, self._vocab_size)
        except BaseException as error:  # a panic in Rust is no Exception
            raise NoVocabularyError(f"the tokenizer in {folder} cannot be read for grammars: {error}") from error

    def _compile(self, grammar: str) -> NewMatcher:
        vocabulary = self._vocabulary.result()
        return partial(GrammarMatcher, vocabulary, compiled(vocabulary, grammar))
