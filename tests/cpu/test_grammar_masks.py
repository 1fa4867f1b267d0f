"""Grammars in a rank: what may come next, masks cut by shard, late and failing grammars, ids that come late."""

import random
import runpy
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer

from actors.decisions import grammar as grammars
from actors.decisions.grammar import GrammarError, GrammarMatcher, compiled, make_vocabulary
from actors.decisions.model.plan import Plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.runner import Runner
from actors.tensors.sampling import compiled_grammars, grammar_masks
from actors.tensors.sampling.tokenizer_file import read_vocabulary
from actors.words.messages import GRAMMAR_FAILED, NO_VOCABULARY, Entry, NewSequence, SamplingParams, StepBatch
from tests.fakes.tiny_tokenizer import END_ID, tiny_tokenizer, with_tokenizer

worlds = runpy.run_path(str(Path(__file__).with_name("test_graph_runner.py")))
CPU = torch.device("cpu")
VOCAB_SIZE = 103  # of the model; those above END_ID mean nothing
TOKENIZER = tiny_tokenizer()
NUM_NEW = 14
GRAMMAR = "start: /(ab|tru|[0-9]{2,4}){3,9}/"


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return make_vocabulary(TOKENIZER.to_str(), VOCAB_SIZE, [END_ID])


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(checkpoints("llama"), tmp_path_factory.mktemp("with_tokenizer"))


@pytest.fixture
def is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps wait for grammars, however slow this machine is."""
    monkeypatch.setattr(grammar_masks, "_FIRST_MASK_S", 60.0)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def allowed(matcher: GrammarMatcher) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(matcher.allowed(), bitorder="little")).tolist())


def test_a_text_may_end_where_it_is_whole_and_must_where_nothing_can_follow(vocabulary: LLTokenizer) -> None:
    matcher = GrammarMatcher(vocabulary, "start: /ab(c!)?/", [END_ID, 7])
    assert allowed(matcher) == {*ids_of("a"), *ids_of("ab"), *ids_of("abc")}
    matcher.follow(ids_of("ab"))
    assert allowed(matcher) == {*ids_of("c"), END_ID, 7}
    matcher.follow(ids_of("c"))
    assert allowed(matcher) == set(ids_of("!"))
    matcher.follow(ids_of("!"))
    assert allowed(matcher) == {END_ID, 7}
    matcher.follow([7])
    assert allowed(matcher) == {END_ID, 7}, "a step that was launched before the end was known"


def test_only_the_end_ids_of_the_request_end_a_text(vocabulary: LLTokenizer) -> None:
    matcher = GrammarMatcher(vocabulary, "start: /a*/", [5])
    matcher.follow(ids_of("a"))
    assert allowed(matcher) == {*ids_of("a"), 5}


def test_padding_is_never_allowed(vocabulary: LLTokenizer) -> None:
    assert allowed(GrammarMatcher(vocabulary, "start: /(.|\\n)*/", [END_ID])) == set(range(END_ID + 1))


def test_what_a_grammar_does_not_allow_is_an_error(vocabulary: LLTokenizer) -> None:
    with pytest.raises(GrammarError):
        GrammarMatcher(vocabulary, "start: ???", [END_ID])
    matcher = GrammarMatcher(vocabulary, "start: /ab/", [END_ID])
    with pytest.raises(GrammarError):
        matcher.follow(ids_of("tru"))


def test_a_vocabulary_that_is_smaller_than_the_tokenizer_s() -> None:
    assert make_vocabulary(TOKENIZER.to_str(), 50, [END_ID]).vocab_size == END_ID + 1


def test_a_tokenizer_in_another_form_is_read_too(folder: Path, tmp_path: Path) -> None:
    """As that of a tokenizer.json: the file lacks a token that tokenizer_config.json adds."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    added = {str(END_ID + 1): {"content": "<|call|>", "special": True}}
    written = {"added_tokens_decoder": added, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(str(written).replace("'", '"').replace("True", "true"))
    vocabulary = read_vocabulary(tmp_path, VOCAB_SIZE)
    assert allowed(GrammarMatcher(vocabulary, "start: <|call|>", [END_ID])) == {END_ID + 1}
    plain = read_vocabulary(folder, VOCAB_SIZE)
    assert plain.vocab_size == vocabulary.vocab_size == VOCAB_SIZE
    with pytest.raises(GrammarError):
        GrammarMatcher(plain, "start: <|call|>", [END_ID])


@pytest.mark.parametrize("backend", [ReferenceBackend(CPU), CPUBackend(CPU)])
@pytest.mark.parametrize("vocab_rows", [(0, 103), (0, 26), (26, 52), (77, 103), (8, 9), (40, 40)])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_each_shard_applies_its_own_part(
    backend: ReferenceBackend, vocab_rows: tuple[int, int], rows: list[int]
) -> None:
    first, end = vocab_rows
    whole_GV = torch.randint(2, (len(rows), 104), generator=torch.Generator().manual_seed(end)).numpy()
    bits_GB = np.packbits(whole_GV.astype(np.uint8), axis=1, bitorder="little")[:, first // 8 : -(-end // 8)]
    logits = torch.randn(3, end - first)
    expected = logits.clone()
    for row, whole_V in zip(rows, whole_GV, strict=True):
        expected[row][torch.from_numpy(whole_V[first:end] == 0)] = float("-inf")
    backend.forbid_tokens(logits, rows, torch.from_numpy(bits_GB.copy()), first % 8)
    assert torch.equal(logits, expected)


def make(backend: Any, plan_of: Callable[..., Plan], folder: Path) -> Runner:
    runner: Runner = worlds["make"](backend, plan_of("llama", scheduler={"max_num_seqs": 4, "depth": 2}), folder)
    return runner


def opened(seq: int, **sampling: Any) -> NewSequence:
    return NewSequence(seq, SamplingParams(**{"temperature": 0.0, "stop_ids": [END_ID], **sampling}), [], 3)


def test_steps_that_are_launched_ahead_follow_their_grammars(
    is_patient: None, plan_of: Callable[..., Plan], folder: Path
) -> None:
    """Ids come late, as those of a GPU do; what a grammar forbids is not drawn, and nobody else's ids change."""
    sampled = []
    for backend, grammar in (
        (CPUBackend(CPU), GRAMMAR),
        (worlds["AwaitedBackend"](), GRAMMAR),
        (CPUBackend(CPU), None),
    ):
        runner = make(backend, plan_of, folder)
        prompts = [Entry(seq, 0, [4, 5, seq], list(range(5 * seq, 5 * seq + 5)), True) for seq in (0, 1)]
        rows = [opened(0, grammar=grammar, logprobs=1), opened(1, temperature=1.0, seed=3)]
        launched = [runner.launch(StepBatch(0, 0, 0, rows, [], prompts))]
        for number in range(1, NUM_NEW):
            entries = [Entry(seq, 2 + number, [], [], True) for seq in (0, 1)]
            launched.append(runner.launch(StepBatch(0, number, 0, [], [], entries)))
        results = [step.take() for step in launched]
        sampled.append([[ids[seq] for step in results for ids in [step.token_ids]] for seq in (0, 1)])  # type: ignore[union-attr]
        logprobs = [step.logprobs[0][0] for step in results]  # type: ignore[union-attr]
        assert all(told.logprob <= told.top_logprobs[0] <= 0 for told in logprobs)
        is_forced = any(told.logprob < told.top_logprobs[0] for told in logprobs)
        assert is_forced == (grammar is not None), "log-probabilities are those without the mask"
    assert sampled[0] == sampled[1]
    assert sampled[0][1] == sampled[2][1] and sampled[0][0] != sampled[2][0]
    ids = [token_id for [token_id] in sampled[0][0]]
    text = TOKENIZER.decode(ids[: ids.index(END_ID)] if END_ID in ids else ids)
    assert set(text) <= set("abtru0123456789") and len(text) >= 6


def test_others_do_not_wait_for_a_grammar_that_is_compiled(
    plan_of: Callable[..., Plan], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_free = threading.Event()

    def slow(*given: Any) -> LLMatcher:
        assert is_free.wait(60)
        return compiled(*given)

    monkeypatch.setattr(compiled_grammars, "compiled", slow)
    runner = make(CPUBackend(CPU), plan_of, folder)
    prompts = [Entry(seq, 0, [4, 5, seq], list(range(5 * seq, 5 * seq + 5)), True) for seq in (0, 1)]
    first = runner.execute(StepBatch(0, 0, 0, [opened(0, grammar=GRAMMAR), opened(1)], [], prompts))
    assert first is not None and first.token_ids[0] == [] and len(first.token_ids[1]) == 1
    again = [Entry(0, 2, [0], [], True), Entry(1, 3, first.token_ids[1], [], True)]
    second = runner.execute(StepBatch(0, 1, 0, [], [], again))
    assert second is not None and second.token_ids[0] == [] and len(second.token_ids[1]) == 1
    is_free.set()
    monkeypatch.setattr(grammar_masks, "_FIRST_MASK_S", 60.0)
    third = runner.execute(StepBatch(0, 2, 0, [], [], [Entry(0, 2, [0], [], True)]))
    assert third is not None and TOKENIZER.decode(third.token_ids[0])[0] in "at0123456789"


def test_another_row_waits_for_a_grammar_once(vocabulary: LLTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody else would wait, each step does: it would compute the same again."""
    waited = []
    monkeypatch.setattr(grammar_masks, "wait", lambda futures, timeout: waited.append(timeout))
    grammars = grammar_masks.Grammars((0, VOCAB_SIZE), VOCAB_SIZE)
    row = grammar_masks.RowGrammar(compiled_grammars.Compilation(GRAMMAR, Future()), [END_ID])
    grammars.begin(row, [])
    for num_rows in (2, 2, 1):
        assert grammars.masks([(0, row)], num_rows).outcomes == {0: grammar_masks.NO_MASK_YET}
    assert [timeout > 0 for timeout in waited] == [True, False, True]


def test_rows_share_a_compilation_and_nothing_that_follows(
    is_patient: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    monkeypatch.setattr(compiled_grammars, "compiled", lambda *given: texts.append(given[1]) or compiled(*given))
    grammars = grammar_masks.Grammars((0, VOCAB_SIZE), VOCAB_SIZE)
    grammars.load(folder)
    rows = [grammars.open("start: /(ab|tru){3}/", [END_ID]) for _ in range(20)]
    for index, row in enumerate(rows):
        grammars.begin(row, ids_of("ab") if index % 2 else [])
    bits_GB = grammars.masks(list(enumerate(rows)), len(rows)).allowed_GB
    assert texts == ["start: /(ab|tru){3}/"]
    assert all(torch.equal(bits_B, bits_GB[index % 2]) for index, bits_B in enumerate(bits_GB))
    assert rows[0].matcher is not None and rows[1].matcher is not None
    rows[1].matcher.follow([*ids_of("abab"), END_ID])
    fresh = allowed(GrammarMatcher(make_vocabulary(TOKENIZER.to_str(), VOCAB_SIZE, [END_ID]), texts[0], [END_ID]))
    assert allowed(rows[0].matcher) == fresh


def test_what_no_row_waits_for_any_more_is_not_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is compiled makes room for what waits behind it: no thread waits for a compilation."""
    is_free, texts = threading.Event(), []

    def slow(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
        texts.append(grammar)
        assert is_free.wait(60)
        return compiled(vocabulary, grammar)

    monkeypatch.setattr(compiled_grammars, "compiled", slow)
    grammars = grammar_masks.Grammars((0, VOCAB_SIZE), VOCAB_SIZE)
    grammars.load(folder)
    rows = [grammars.open(f"start: /a{{{number}}}/", [END_ID]) for number in range(1, 12)]
    for row in rows:
        grammars.begin(row, [])
    for row in rows[6:10]:
        grammars.close(row)
    is_free.set()
    assert rows[-1].done is not None
    rows[-1].done.result(60)
    assert sorted(texts) == sorted(f"start: /a{{{number}}}/" for number in (1, 2, 3, 4, 5, 6, 11))
    again = grammars.open("start: /a{7}/", [END_ID])
    grammars.begin(again, [])
    assert again.done is not None
    again.done.result(60)
    assert again.failure is None


def test_a_tokenizer_that_ranks_cannot_read_is_no_fault_of_the_grammar(
    is_patient: None, checkpoints: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    grammars = grammar_masks.Grammars((0, VOCAB_SIZE), VOCAB_SIZE)
    grammars.load(checkpoints("llama"))
    row = grammars.open(GRAMMAR, [END_ID])
    grammars.begin(row, [])
    assert grammars.masks([(0, row)], 1).outcomes == {0: NO_VOCABULARY}
    assert str(checkpoints("llama")) in caplog.text


def test_a_long_string_with_a_bound_stays_within_the_limits(vocabulary: LLTokenizer) -> None:
    """It needs several states a character."""
    bounded = GrammarMatcher(vocabulary, "start: /[a-z]{1,2000}/", [END_ID])
    for _ in range(1999):
        bounded.allowed()
        bounded.follow(ids_of("a"))
    assert END_ID in allowed(bounded)


@pytest.mark.parametrize("limits", [{"max_grammar_size": 1}, {"step_lexer_fuel": 1}])
def test_a_limit_fails_its_row_alone(
    is_patient: None,
    plan_of: Callable[..., Plan],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, int],
) -> None:
    """While it is compiled, and in a mask; the next step, launched already, goes on with some id."""
    monkeypatch.setattr(grammars, "LIMITS", limits)
    runner = make(CUDABackend(CPU), plan_of, folder)
    prompts = [Entry(seq, 0, [4, 5, seq], list(range(5 * seq, 5 * seq + 5)), True) for seq in (0, 1)]
    first = runner.launch(StepBatch(0, 0, 0, [opened(0, grammar=GRAMMAR), opened(1)], [], prompts))
    after = runner.launch(StepBatch(0, 1, 0, [], [], [Entry(seq, 3, [], [], True) for seq in (0, 1)]))
    for step in (first.take(), after.take()):
        assert step is not None and step.token_ids[0] == [GRAMMAR_FAILED] and step.token_ids[1][0] >= 0


def test_a_row_that_is_computed_again_goes_on_where_it_was(
    is_patient: None, plan_of: Callable[..., Plan], folder: Path
) -> None:
    """As after a preemption or a lost gang: its ids come back in chunks, and the grammar follows them at once."""
    runner = make(CPUBackend(CPU), plan_of, folder)
    grammar, chance = "start: /[0-9]{1,9}!/", random.Random(0)
    blocks, ids = list(range(6)), [4, 5, 6]
    for number in range(6):
        new = NewSequence(number, SamplingParams(0.9, seed=7, grammar=grammar, stop_ids=[END_ID]), [], 3)
        at = chance.randint(1, len(ids) - 1)
        closed = [number - 1] if number else []
        runner.execute(StepBatch(0, 2 * number, 0, [new], closed, [Entry(number, 0, ids[:at], blocks, False)]))
        step = runner.execute(StepBatch(0, 2 * number + 1, 0, [], [], [Entry(number, at, ids[at:], [], True)]))
        assert step is not None
        ids += step.token_ids[0]
    again = opened(9, temperature=0.9, seed=7, grammar=grammar)
    straight = runner.execute(StepBatch(0, 20, 0, [again], [5], [Entry(9, 0, ids[:3], blocks, True)]))
    drawn = []
    for number in range(6):
        assert straight is not None
        drawn += straight.token_ids[0]
        entry = Entry(9, 3 + number, drawn[-1:], [], True)
        straight = runner.execute(StepBatch(0, 21 + number, 0, [], [], [entry]))
    assert drawn == ids[3:]
