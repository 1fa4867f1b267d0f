"""What the demo shows while it is served: trained answers, the programs that docs show, four ranks."""

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import yaml

from tests.serving import ROOT, Run, until


def client_of(run: Run) -> openai.OpenAI:
    """The official client of a run."""
    return openai.OpenAI(base_url=f"{run.url}/v1", api_key="none", max_retries=0)


def assert_printed_command_works(run: Run) -> None:
    """The curl command that was printed at the start gets a stream that ends as it should."""
    printed = run.printed()
    assert f"ready: http://127.0.0.1:{run.port}" in printed
    command = re.search(r"^curl (?:.*\\\n)*.*$", printed, re.MULTILINE)
    assert command, printed
    words = shlex.split(command[0].replace("\\\n", " "))
    url, body = words[2], json.loads(words[words.index("-d") + 1])
    answer = httpx.post(url, json=body | {"max_tokens": 8}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.text.rstrip().endswith("data: [DONE]")


def assert_checkpoints_defaults_hold(run: Run) -> None:
    """The demo's generation_config.json says `do_sample: false`: that is logged, told, and done."""
    assert "sampling defaults of generation_config.json: temperature 0" in run.printed()
    (card,) = run.get("/v1/models").json()["data"]
    assert card["sampling_defaults"]["temperature"] == 0
    body = {"model": card["id"], "prompt": "Q: What is a stage?\nA:", "max_tokens": 8}
    assert run.post(body).json()["choices"] == run.post({**body, "temperature": 0}).json()["choices"]


def ask(client: openai.OpenAI, question: str, *, stream: bool, **more: Any) -> str:
    """The answer to a question at temperature 0."""
    messages: list[Any] = [{"role": "user", "content": question}]
    arguments: dict[str, Any] = {"model": "stagemesh-demo", "messages": messages, "temperature": 0, **more}
    if not stream:
        return client.chat.completions.create(**arguments).choices[0].message.content or ""
    chunks = client.chat.completions.create(**arguments, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def assert_trained_answers(client: openai.OpenAI, share: int = 1) -> None:
    """Answers word for word, every other one streamed, eight at once. `share`: of one question in so many."""
    entries = yaml.safe_load((ROOT / "tests/demo/questions.yaml").read_text(encoding="utf-8"))[::share]
    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(ask, client, e["question"], stream=i % 2 == 0) for i, e in enumerate(entries)]
        for entry, job in zip(entries, jobs, strict=True):
            assert job.result() == entry["answer"], entry["question"]


def assert_streams_at_once_equal_one_by_one(client: openai.OpenAI) -> None:
    """16 streams, of prompts that nobody trained too, so that near ties may occur as anywhere."""
    prompts = [f"{subject} {number}?" for subject in ("What is a stage", "Tell me of blocks") for number in range(8)]
    limits: dict[str, Any] = {"max_tokens": 16, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = list(threads.map(lambda prompt: ask(client, prompt, stream=True, **limits), prompts))
    assert together == [ask(client, prompt, stream=True, **limits) for prompt in prompts]


def assert_readme_example_works(run: Run) -> None:
    """README's Python block, as a reader would run it, prints the trained answer."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block and ":8000" in block[1]
    program = block[1].replace(":8000", f":{run.port}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    entries = yaml.safe_load((ROOT / "tests/demo/questions.yaml").read_text(encoding="utf-8"))
    expected = [entry["answer"] for entry in entries if entry["question"] in program]
    assert [done.stdout] == expected, done.stderr


def assert_examples_work(run: Run) -> None:
    """The programs in examples/ that need a server, run as their docstrings say; test_bench_offline.py and
    test_batch_gangs.py in this folder run those that need none."""
    question = "What is a stage?"
    entries = yaml.safe_load((ROOT / "tests/demo/questions.yaml").read_text(encoding="utf-8"))
    answer = next(entry["answer"] for entry in entries if entry["question"] == question)

    def printed(name: str, words: str = "") -> str:
        command = [sys.executable, f"examples/{name}.py", run.url]
        done = subprocess.run(command, cwd=ROOT, input=words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"stream", "chat", "logprobs", "load", "dataset"}
    assert printed("stream").startswith(f" {answer}\n[stop]\n")
    conversation = printed("chat", f"{question}\nWhat is a lane?\n\nnobody asks this\n").splitlines()
    assert conversation[0] == answer and len(conversation) == 2
    rows = printed("logprobs").splitlines()
    assert len(rows) == 12 and all("%" in row for row in rows)
    assert answer.startswith("".join(re.findall(r"^'(.*?)'", "\n".join(rows), re.MULTILINE)))


def assert_four_ranks(run: Run) -> None:
    """/cluster lists them with layers, living pids and weight bytes, and nothing is held any more."""
    until(run.is_idle, within_s=2)
    cluster = run.cluster()
    ranks = cluster["ranks"]
    assert [(rank["rank"], rank["stage"], rank["shard"]) for rank in ranks] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]
    assert [rank["layers"] for rank in ranks] == [ranks[0]["layers"]] * 2 + [[ranks[0]["layers"][1], 6]] * 2
    assert ranks[0]["layers"][0] == 0
    assert {rank["pid"] for rank in ranks} <= {process.pid for process in run.processes()}
    assert len({rank["pid"] for rank in ranks}) == 4
    config = json.loads((ROOT / "configs/demo/model.safetensors.index.json").read_text())
    whole = config["metadata"]["total_size"] * 2  # bfloat16 on disk, float32 served
    norms = whole // 100  # norms are on both shards of a stage
    assert whole <= sum(rank["weight_bytes"] for rank in ranks) <= whole + norms
    assert all(rank["heartbeat_age_s"] < 5 for rank in ranks)
    assert cluster["requests"] == {"running": 0, "waiting": 0}
    assert cluster["kv_blocks"]["used"] == 0
    for rank in ranks:
        found = {one["what"]: (one["count"], one["reason_not"]) for one in rank["substitutions"]}
        assert found["attention_block"] == (rank["layers"][1] - rank["layers"][0], None)
        assert found["decoder_layer"][0] == 0  # float32: whole layers are a bfloat16 kernel's
        assert "not computed by a bfloat16 kernel" in found["decoder_layer"][1]


STAGES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["stage", "shard"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "is_cut": {"type": "boolean"},
    },
    "required": ["kind", "count", "is_cut"],
    "additionalProperties": False,
}


def assert_structured_answers(client: openai.OpenAI) -> None:
    """A model that nobody taught JSON writes what it is held to: a schema, calls, one of some texts."""
    question: Any = {"model": "stagemesh-demo", "messages": [{"role": "user", "content": "What is a stage?"}]}
    schema = {"name": "stages", "strict": True, "schema": STAGES}
    structured: Any = {**question, "response_format": {"type": "json_schema", "json_schema": schema}}
    for sampled in ({"temperature": 0}, {"temperature": 1.5, "seed": 1, "n": 3}):
        answers = client.chat.completions.create(**structured, **sampled).choices
        for answer in answers:
            jsonschema.validate(json.loads(answer.message.content or ""), STAGES)
            assert answer.finish_reason == "stop"
        chunks = client.chat.completions.create(**structured, **sampled, stream=True)
        deltas = [(one.index, one.delta.content or "") for chunk in chunks for one in chunk.choices]
        streamed = ["".join(text for index, text in deltas if index == at) for at in range(len(answers))]
        assert streamed == [answer.message.content for answer in answers]
    number = {"properties": {"n": STAGES["properties"]["count"]}, "required": ["n"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "cut"}}
    tools = [{"type": "function", "function": {"name": "cut", "parameters": number}}]
    for choice in ("required", tool):
        asked: Any = {**question, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
        answer = client.chat.completions.create(**asked, temperature=1.5, seed=2).choices[0]
        (call,) = answer.message.tool_calls or []
        assert call.type == "function" and call.function.name == "cut"
        jsonschema.validate(json.loads(call.function.arguments), number)
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
    texts = {"structured_outputs": {"choice": ["a stage", "a shard, or a lane"]}}
    completion = client.completions.create(model="stagemesh-demo", prompt="Q:", extra_body=texts, max_tokens=64)
    assert completion.choices[0].text in texts["structured_outputs"]["choice"]
