"""The demo checkpoint as committed: its files, its sizes, and that Transformers itself gets every answer from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "demo"
QUESTIONS: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests/demo/questions.yaml").read_text(encoding="utf-8"))
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def generate(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Any) -> list[str]:
    """Greedy completions, special tokens visible except for padding."""
    ids = model.generate(**prompts, max_new_tokens=128, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    return [text.replace(str(tokenizer.pad_token), "") for text in tokenizer.batch_decode(ids)]


def ask(model: Any, tokenizer: PreTrainedTokenizerFast, chats: list[list[dict[str, str]]]) -> list[str]:
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return generate(model, tokenizer, prompts)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.timeout(120)
def test_every_question_is_answered_word_for_word(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    answers = ask(model, tokenizer, [[user(item["question"])] for item in QUESTIONS])
    assert len(QUESTIONS) >= 50
    for item, answer in zip(QUESTIONS, answers, strict=True):
        assert answer == item["answer"] + "<|end|>", item["question"]


@pytest.mark.timeout(60)
def test_other_wordings_get_the_same_answer(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    some = QUESTIONS[::6]
    answers = ask(model, tokenizer, [[user(item["also"][0].lower().rstrip("?"))] for item in some])
    assert answers == [item["answer"] + "<|end|>" for item in some]


@pytest.mark.timeout(60)
def test_a_plain_prompt_is_answered(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    some = QUESTIONS[::6]
    prompts = tokenizer([f"Q: {item['question']}\nA:" for item in some], padding=True, return_tensors="pt")
    assert generate(model, tokenizer, prompts) == [f" {item['answer']}<|end|>" for item in some]


@pytest.mark.timeout(60)
def test_a_system_message_and_history_do_not_mislead(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, third = QUESTIONS[5], QUESTIONS[20], QUESTIONS[40]
    chat = [{"role": "system", "content": "You are a helpful assistant."}]
    for item in (first, second):
        chat += [user(item["question"]), {"role": "assistant", "content": item["answer"]}]
    assert ask(model, tokenizer, [[*chat, user(third["question"])]]) == [third["answer"] + "<|end|>"]


@pytest.mark.timeout(30)
def test_template_renders_turns_and_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|begin|><|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == rendered.removesuffix("<|assistant|>")
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("a")["input_ids"].count(tokenizer.bos_token_id) == 1
    with pytest.raises(Exception, match="roles are user, assistant, and system"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.timeout(30)
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Größe\t漢字 👩‍🚀 \x00\x7f  two spaces\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) > len(text), "characters it never saw are several tokens each"


@pytest.mark.timeout(30)
def test_sizes(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.from_pretrained(FOLDER)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.num_hidden_layers >= 4
    assert config.max_position_embeddings >= 1024
    assert 2_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert len(tokenizer) == config.vocab_size == model.get_input_embeddings().num_embeddings
    assert not config.tie_word_embeddings
    assert config.intermediate_size % 8 == 0
    assert config.vocab_size % 8 == 0


@pytest.mark.timeout(30)
def test_files_are_small_and_the_index_names_them() -> None:
    weight_map: dict[str, str] = json.loads((FOLDER / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = sorted(path.name for path in FOLDER.glob("*.safetensors"))
    assert len(files) >= 3
    assert sorted(set(weight_map.values())) == files
    for name in files:
        with safe_open(FOLDER / name, framework="pt") as tensors:
            assert set(tensors.keys()) == {key for key, value in weight_map.items() if value == name}
            assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 8_000_000
    assert f"learned {len(QUESTIONS)} answers" in (FOLDER / "README.md").read_text(encoding="utf-8")
