"""guidellm: three chats and three completions one after the other, measured from the usage in their chunks."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from cases import FOLDER, MODEL, URL, run


def measured(route):
    report = Path(FOLDER) / "guidellm.json"
    report.unlink(missing_ok=True)
    options = {
        "backend": f"kind=openai_http,target={URL},model={MODEL},request_format={route}",
        "profile": "kind=synchronous",
        "constraint": "kind=max_requests,count=3",
        "tokenizer": f"kind=hf_auto,model={FOLDER}",
        "data": "kind=synthetic_text,prompt_tokens=48,output_tokens=8",
        "output": f"kind=json,path={report}",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [str(Path(sys.executable).parent / "guidellm"), "run", *given, "--disable-console"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout[-1500:] + ended.stderr[-1500:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return benchmark["requests"]


def check(requests):
    assert len(requests["successful"]) == 3, requests
    assert not requests["errored"], requests["errored"]
    for one in requests["successful"]:
        assert one["output_metrics"]["text_tokens"] == 8, one
        assert one["input_metrics"]["text_tokens"] >= 48, one


def chats():
    check(measured("/v1/chat/completions"))


def completions():
    check(measured("/v1/completions"))


run(version("guidellm"), chats, completions)
