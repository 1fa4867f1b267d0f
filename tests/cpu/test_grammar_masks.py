"""Grammars in a rank: what may come next, masks cut by shard, late and failing grammars, ids that come late."""

import random
import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLParserLimits, LLTokenizer

from actors.decisions import grammar as grammars
from actors.decisions.grammar import GrammarError, GrammarMatcher, make_vocabulary
from actors.decisions.model.plan import Plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.runner import Runner
from actors.tensors.sampling import grammar_masks
from actors.tensors.sampling.tokenizer_file import read_vocabulary
from actors.words.messages import GRAMMAR_FAILED, Entry, NewSequence, SamplingParams, StepBatch
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


def test_a_vocabulary_that_is_smaller_than_the_tokenizer_s(vocabulary: LLTokenizer) -> None:
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

    def slow(*given: Any) -> GrammarMatcher:
        assert is_free.wait(60)
        return GrammarMatcher(*given)

    monkeypatch.setattr(grammar_masks, "GrammarMatcher", slow)
    runner = make(CPUBackend(CPU), plan_of, folder)
    prompts = [Entry(seq, 0, [4, 5, seq], list(range(5 * seq, 5 * seq + 5)), True) for seq in (0, 1)]
    first = runner.execute(StepBatch(0, 0, 0, [opened(0, grammar=GRAMMAR), opened(1)], [], prompts))
    assert first is not None and first.token_ids[0] == [] and len(first.token_ids[1]) == 1
    again = [Entry(0, 2, [0], [], True), Entry(1, 3, first.token_ids[1], [], True)]
    second = runner.execute(StepBatch(0, 1, 0, [], [], again))
    assert second is not None and second.token_ids[0] == [] and len(second.token_ids[1]) == 1
    is_free.set()
    monkeypatch.setattr(grammar_masks, "_FIRST_MASK_S", 60.0)
    again = [Entry(0, 2, [0], [], True), Entry(1, 4, second.token_ids[1], [], True)]
    third = runner.execute(StepBatch(0, 2, 0, [], [], again))
    assert third is not None and TOKENIZER.decode(third.token_ids[0])[0] in "at0123456789"


@pytest.mark.parametrize("limits", [LLParserLimits(max_grammar_size=1), LLParserLimits(step_lexer_fuel=1)])
def test_a_limit_fails_its_row_alone(
    is_patient: None,
    plan_of: Callable[..., Plan],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: LLParserLimits,
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
