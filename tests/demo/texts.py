"""The texts of the demo checkpoint: questions in many wordings, their tokenizer, and the rows that training reads."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
MAX_MODEL_LEN = 2048  # tokens
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = SPECIALS = (
    "<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.")
ANSWERS_PER_BATCH = 16
IGNORED = -100  # label of a token that is read, not learned

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {{- '<|system|>' + message.content }}
    {%- elif message.role == 'user' %}
        {{- '<|user|>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('roles are user, assistant, and system for the first message') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


@dataclass(frozen=True)
class Entry:
    """One answer, and every wording of its question that the model learns; the first is the one in questions.yaml."""

    wordings: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Row:
    """One training text: token ids [T], and labels [T] that are IGNORED outside the answers."""

    ids: list[int]
    labels: list[int]


def read_entries(path: Path) -> list[Entry]:
    """The questions, each as written, in its other wordings, in lower case and without its question mark."""
    entries = []
    for item in yaml.safe_load(path.read_text(encoding="utf-8")):
        as_written = [item["question"], *item["also"]]
        bare = [text.rstrip("?!") for text in as_written]
        variants = as_written + bare + [text.lower() for text in as_written + bare]
        entries.append(Entry(tuple(dict.fromkeys(variants)), item["answer"]))
    every = [wording for entry in entries for wording in entry.wordings]
    twice = sorted({wording for wording in every if every.count(wording) > 1})
    if twice:
        raise ValueError(f"{path}: a question needs one answer, but these have several: {twice}")
    return entries


def train_tokenizer(entries: list[Entry]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE ids: all 256 bytes are in it, so no text is unknown."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for entry in entries for text in (entry.answer, *entry.wordings)]
    core.train_from_iterator([*texts, *SYSTEM_PROMPTS, "Q: What?\nA: A"], trainer)
    if core.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the texts yield {core.get_vocab_size()} token ids, not {VOCAB_SIZE}: lower VOCAB_SIZE")
    bos_id = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=MAX_MODEL_LEN,
        clean_up_tokenization_spaces=False,
    )


class Writer:
    """Turns questions and answers into rows, token for token as the chat template renders them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _row(self, read_and_learned: Iterable[tuple[str, str]]) -> Row:
        ids, labels = [], []
        for read, learned in read_and_learned:
            read_ids, learned_ids = self._ids(read), self._ids(learned)
            ids += read_ids + learned_ids
            labels += [IGNORED] * len(read_ids) + learned_ids
        return Row(ids, labels)

    def chat(self, turns: list[tuple[str, str]], system: str | None = None) -> Row:
        """A conversation of (question, answer) turns; every answer and the EOS after it is learned."""
        before = BOS + (SYSTEM + system if system else "")
        pieces = []
        for question, answer in turns:
            pieces.append((f"{before}{USER}{question}{ASSISTANT}", answer + EOS))
            before = ""
        return self._row(pieces)

    def completion(self, question: str, answer: str) -> Row:
        """The plain prompt `Q: …` newline `A:`, for the completions route."""
        return self._row([(f"{BOS}Q: {question}\nA:", f" {answer}{EOS}")])

    def check_template(self, entry: Entry) -> None:
        """The chat template must give the ids that are trained on, else the served model sees other prompts."""
        question, answer = entry.wordings[0], entry.answer
        messages = [{"role": "system", "content": SYSTEM_PROMPTS[0]}]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] * 2
        rendered = self._tokenizer.apply_chat_template(messages, return_dict=False)
        assert rendered == self.chat([(question, answer)] * 2, SYSTEM_PROMPTS[0]).ids
        prompt = self._tokenizer(f"Q: {question}\nA:")["input_ids"]
        assert prompt == self.completion(question, answer).ids[: len(prompt)]


def draw_batches(entries: list[Entry], writer: Writer, rng: random.Random) -> Iterator[list[Row]]:
    """Endless batches of ANSWERS_PER_BATCH answers: rows of 1, 2, 4 or 8 turns, so that history does not mislead."""
    waiting: list[Entry] = []
    while True:
        num_turns = rng.choices((1, 2, 4, 8), weights=(50, 20, 20, 10))[0]
        rows = []
        for _ in range(ANSWERS_PER_BATCH // num_turns):
            while len(waiting) < num_turns:
                waiting += rng.sample(entries, len(entries))
            turns = [(rng.choice(entry.wordings), entry.answer) for entry in waiting[:num_turns]]
            del waiting[:num_turns]
            if num_turns == 1 and rng.random() < 0.25:
                rows.append(writer.completion(*turns[0]))
            else:
                rows.append(writer.chat(turns, rng.choice((None, None, None, *SYSTEM_PROMPTS))))
        yield rows
