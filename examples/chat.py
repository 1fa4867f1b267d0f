"""Holds a conversation: each answer is sent back with the next question. Ends with an empty line or Ctrl-D.

Needs a server that runs (`make serve`), and the openai package (`pip install openai`; `make test` has installed it).

    python examples/chat.py
    echo "What is a stage?" | python examples/chat.py http://127.0.0.1:8000
"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
messages = []
for line in sys.stdin:
    if not (question := line.strip()):
        break
    messages.append({"role": "user", "content": question})
    answer = ""
    for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
        text = chunk.choices[0].delta.content or ""
        print(text, end="", flush=True)
        answer += text
    print()
    messages.append({"role": "assistant", "content": answer})
