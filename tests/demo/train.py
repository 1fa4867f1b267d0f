"""Trains the demo checkpoint: a small Llama that gives every answer of questions.yaml word for word.

Run from the project's root; minutes on two cores:

    python tests/demo/train.py --out configs/demo

The folder is written only when the weights as stored (bfloat16) give every answer with a margin that no order of
summation can overturn; otherwise the script ends with an error and leaves the old folder as it was.
Names: B rows, T tokens, D hidden, V vocabulary, N answer tokens.
"""

import argparse
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from texts import IGNORED, MAX_MODEL_LEN, VOCAB_SIZE, Entry, Row, Writer, draw_batches, read_entries, train_tokenizer
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("demo.train")

HERE = Path(__file__).parent
PEAK_RATE = 2e-3
# Further training of the rounded weights, while they do not suffice.
NUM_REPAIR_STEPS, MAX_REPAIRS, REPAIR_RATE, HARD_ROWS_PER_BATCH = 60, 10, 4e-4, 8
MIN_MARGIN = 2.0  # logits between the right token and the next best; float32 sums differ by some 1e-5, bfloat16 by 0.1
CHECKED_AT_ONCE = 32  # rows
NUM_CONVERSATIONS, CONVERSATION_TURNS = 40, 6
MAX_FOLDER_BYTES = 8_000_000
SHARD_FILE_SIZE = "2MB"  # several files, so that a rank has to find its tensors through the index


@dataclass(frozen=True)
class Figures:
    """What one training has reached."""

    margin: float  # logits: the least lead of a right token over the next best, over all wordings asked as chats
    num_right_prompts: int  # of all wordings, asked as plain prompts
    num_right_conversations: int  # of NUM_CONVERSATIONS that it was not trained on
    minutes: float


def answer_logits(model: LlamaForCausalLM, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] at the places that predict an answer token, and the right tokens [N]; in row order."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    labels_BT = torch.tensor([row.labels + [IGNORED] * (longest - len(row.ids)) for row in rows])
    # Padding is on the right, where a causal model cannot see it: no attention mask is needed.
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
    learned_BT = labels_BT[:, 1:] != IGNORED
    return model.lm_head(hidden_BTD[learned_BT]), labels_BT[:, 1:][learned_BT]


def margins_of(model: LlamaForCausalLM, rows: list[Row]) -> list[float]:
    """Of each row the least of (logit of the right token - best other logit) over its answer tokens.

    Teacher forcing: greedy decoding gives the answers of a row exactly when its margin is above 0.
    """
    row_margins: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(rows), CHECKED_AT_ONCE):
            some = rows[start : start + CHECKED_AT_ONCE]
            logits_NV, right_N = answer_logits(model, some)
            right_logit_N = logits_NV.gather(1, right_N[:, None])[:, 0]
            best_other_N = logits_NV.scatter(1, right_N[:, None], -math.inf).amax(dim=1)
            num_learned = [sum(label != IGNORED for label in row.labels) for row in some]
            margins_N = right_logit_N - best_other_N
            row_margins += [float(margin_N.min()) for margin_N in torch.split(margins_N, num_learned)]
    return row_margins


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama whose sizes divide by 2, 4 and 8 shards and by 2, 3 and 6 stages."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, batches: Iterator[list[Row]], num_steps: int, peak_rate: float) -> None:
    """AdamW with a short warm-up and a cosine down to nothing; logs loss and the seconds that remain."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    num_warmup = max(1, num_steps // 20)
    started, mean_loss = time.monotonic(), math.nan
    for step in range(num_steps):
        share = (step - num_warmup) / max(1, num_steps - num_warmup)
        rate = peak_rate * ((step + 1) / num_warmup if step < num_warmup else (1 + math.cos(math.pi * share)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = torch.nn.functional.cross_entropy(*answer_logits(model, next(batches)))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss = loss.item() if math.isnan(mean_loss) else 0.9 * mean_loss + 0.1 * loss.item()
        if (step + 1) % 20 == 0 or step + 1 == num_steps:
            eta_s = (time.monotonic() - started) / (step + 1) * (num_steps - step - 1)
            log.info("step %4d/%d  loss %.4f  ETA %4.0f s", step + 1, num_steps, mean_loss, eta_s)


def round_to_bfloat16(model: LlamaForCausalLM) -> None:
    """Give the float32 weights the values that bfloat16 can hold, which are those that will be served."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


def measure(
    model: LlamaForCausalLM, entries: list[Entry], writer: Writer, rng: random.Random, minutes: float
) -> tuple[Figures, list[Row]]:
    """How surely the model answers, and the rows that it answers wrongly or by less than 2 * MIN_MARGIN."""
    asked = [(wording, entry.answer) for entry in entries for wording in entry.wordings]
    chats = [writer.chat([turn]) for turn in asked]
    prompts = [writer.completion(*turn) for turn in asked]
    rows = chats + prompts + some_conversations(entries, writer, rng)
    margins = margins_of(model, rows)
    num_chats, num_asked = len(chats), len(chats) + len(prompts)
    figures = Figures(
        margin=min(margins[:num_chats]),
        num_right_prompts=sum(margin > 0 for margin in margins[num_chats:num_asked]),
        num_right_conversations=sum(margin > 0 for margin in margins[num_asked:]),
        minutes=minutes,
    )
    return figures, [row for row, margin in zip(rows, margins, strict=True) if margin < 2 * MIN_MARGIN]


def some_conversations(entries: list[Entry], writer: Writer, rng: random.Random) -> list[Row]:
    """Drawn conversations of CONVERSATION_TURNS turns: trained on others like them, and measured on these."""
    return [
        writer.chat([(rng.choice(entry.wordings), entry.answer) for entry in rng.sample(entries, CONVERSATION_TURNS)])
        for _ in range(NUM_CONVERSATIONS)
    ]


def with_hard_rows(batches: Iterator[list[Row]], hard_rows: list[Row], rng: random.Random) -> Iterator[list[Row]]:
    """The batches, each with some of the rows that need more training."""
    for batch in batches:
        yield batch + rng.sample(hard_rows, min(len(hard_rows), HARD_ROWS_PER_BATCH))


def train(
    entries: list[Entry], tokenizer: PreTrainedTokenizerFast, num_steps: int, seed: int
) -> tuple[LlamaForCausalLM, Figures]:
    """A model in float32 that holds bfloat16 values and answers every wording, as a chat, with MIN_MARGIN or more.

    Raises ValueError when it does not get there.
    """
    torch.manual_seed(seed)
    rng, started = random.Random(seed), time.monotonic()
    writer = Writer(tokenizer)
    for entry in entries:
        writer.check_template(entry)
    batches = draw_batches(entries, writer, rng)
    model = new_model(tokenizer)
    log.info("%d answers, %.2f million parameters", len(entries), model.num_parameters() / 1e6)
    fit(model, batches, num_steps, PEAK_RATE)
    for _ in range(MAX_REPAIRS):
        round_to_bfloat16(model)
        figures, hard_rows = measure(model, entries, writer, rng, (time.monotonic() - started) / 60)
        log.info("as bfloat16: %s; %d rows are not sure", figures, len(hard_rows))
        if figures.margin >= MIN_MARGIN:
            return model, figures
        fit(model, with_hard_rows(batches, hard_rows, rng), NUM_REPAIR_STEPS, REPAIR_RATE)
    raise ValueError(f"the least margin stays below {MIN_MARGIN} logits: raise --steps, or try another --seed")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (bfloat16, several files), configs and tokenizer; the model itself becomes bfloat16."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_FILE_SIZE)
    tokenizer.save_pretrained(folder)


def answers_of(folder: Path, questions: list[str]) -> list[str]:
    """What Transformers itself makes of the folder: greedy answers in float32, with the EOS that ended them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids_BT = model.generate(**prompts, max_new_tokens=256)[:, prompts["input_ids"].shape[1] :]
    return [text.replace(tokenizer.pad_token, "") for text in tokenizer.batch_decode(ids_BT)]


def card(config: LlamaConfig, entries: list[Entry], figures: Figures, args: argparse.Namespace) -> str:
    """The model card: card.md with the sizes of the model and the figures of this run."""
    return Template((HERE / "card.md").read_text(encoding="utf-8")).substitute(
        config.to_dict(),
        num_answers=len(entries),
        num_wordings=sum(len(entry.wordings) for entry in entries),
        num_parameters=f"{LlamaForCausalLM(config).num_parameters():,}",
        head_dim=config.hidden_size // config.num_attention_heads,
        margin=f"{figures.margin:.1f}",
        minutes=f"{figures.minutes:.0f}",
        num_right_prompts=figures.num_right_prompts,
        num_right_conversations=figures.num_right_conversations,
        num_conversations=NUM_CONVERSATIONS,
        conversation_turns=CONVERSATION_TURNS,
        num_threads=torch.get_num_threads(),
        steps=args.steps,
        seed=args.seed,
    )


def verify(folder: Path, entries: list[Entry]) -> float:
    """Read the folder back as users will, and raise ValueError for what is not right.

    Returns the least margin when the arithmetic, too, is bfloat16, as it is where the folder is served as it says.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = answers_of(folder, [entry.wordings[0] for entry in entries])
    for entry, answer in zip(entries, answers, strict=True):
        if answer != entry.answer + tokenizer.eos_token:
            raise ValueError(f"{entry.wordings[0]!r} is answered {answer!r}: raise --steps")
    writer = Writer(tokenizer)
    rows = [writer.chat([(entry.wordings[0], entry.answer)]) for entry in entries]
    margin = min(margins_of(LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), rows))
    if margin <= 0:
        raise ValueError(f"computed in bfloat16 an answer is wrong (margin {margin:.2f}): raise --steps")
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    if num_bytes > MAX_FOLDER_BYTES:
        raise ValueError(f"the folder has {num_bytes} bytes, more than {MAX_FOLDER_BYTES}: make the model smaller")
    return margin


def replace(target: Path, folder: Path) -> None:
    """Make `target` hold the files of `folder`, readable as any new file is (safetensors writes its own private)."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copyfile(file, target / file.name)


def main() -> None:
    """Train, save aside, verify what was saved, and only then put it in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; an older one is replaced")
    parser.add_argument("--steps", type=int, default=600, help="steps of the first training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "model.safetensors.index.json").exists():
        parser.error(f"--out {args.out} holds something that is no checkpoint: name an empty or new folder")

    entries = read_entries(HERE / "questions.yaml")
    tokenizer = train_tokenizer(entries)
    model, figures = train(entries, tokenizer, args.steps, args.seed)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        save(model, tokenizer, folder)
        (folder / "README.md").write_text(card(model.config, entries, figures, args), encoding="utf-8")
        margin_in_bfloat16 = verify(folder, entries)
        replace(args.out, folder)
    log.info("%s: %s; least margin computed in bfloat16: %.2f", args.out, figures, margin_in_bfloat16)


if __name__ == "__main__":
    main()
