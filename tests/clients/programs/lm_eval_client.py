"""lm-eval: log-likelihoods by completions with `echo`, and texts by chats, over a task of three lines."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import lm_eval
from cases import FOLDER, HELLO, MODEL, URL, run
from lm_eval.tasks import TaskManager

LINES = [{"question": "one two", "choices": ["one", "two"], "label": 1, "answer": HELLO} for _ in range(3)]
COMMON = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0, "doc_to_text": "{{question}}"}


def evaluate(kind, route, task, is_chat=False):
    folder = Path(FOLDER) / f"tasks-{task['task']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    task = {**COMMON, **task, "dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}}}
    (folder / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    options = {"model": MODEL, "base_url": f"{URL}/{route}", "tokenizer": FOLDER, "max_retries": 1}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    settings = {"tasks": [task["task"]], "task_manager": manager, "log_samples": True, "apply_chat_template": is_chat}
    return lm_eval.simple_evaluate(kind, model_args=options, **settings)


def loglikelihoods():
    task = {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    found = evaluate("local-completions", "completions", {**task, "metric_list": [{"metric": "acc"}]})
    for sample in found["samples"]["choices"]:
        ((first, _),), ((second, _),) = sample["resps"]
        assert float(first) < 0 and float(second) < 0


def texts():
    task = {"task": "says", "output_type": "generate_until", "doc_to_target": "answer"}
    task["metric_list"] = [{"metric": "exact_match"}]
    task["generation_kwargs"] = {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False}
    found = evaluate("local-chat-completions", "chat/completions", task, is_chat=True)
    assert found["results"]["says"]["exact_match,none"] == 1.0, found["results"]


run(version("lm_eval"), loglikelihoods, texts)
