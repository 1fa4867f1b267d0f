"""Streams a completion: prints each piece of text as soon as the server sends it, then why the text ended.

Needs a server that runs (`make serve`), and the openai package (`pip install openai`; make has installed it).

    python examples/stream.py
    python examples/stream.py http://127.0.0.1:8000 "Q: What is a stage?
    A:"
"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
prompt = sys.argv[2] if len(sys.argv) > 2 else "Q: What is a stage?\nA:"

client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
stream = client.completions.create(
    model=model,
    prompt=prompt,
    max_tokens=100,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.text, end="", flush=True)
        if choice.finish_reason:
            print(f"\n[{choice.finish_reason}]")
    if chunk.usage:
        print(f"{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} tokens out")
