"""Shows how sure the model was: each token of an answer, its probability, and the likeliest other tokens.

Log-probabilities are those of the model itself, before penalties and temperature.
Needs a server that runs (`make serve`), and the openai package (`pip install openai`; `make test` has installed it).

    python examples/logprobs.py
    python examples/logprobs.py http://127.0.0.1:8000 "What is a stage?"
"""

import math
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
question = sys.argv[2] if len(sys.argv) > 2 else "What is a stage?"

client = OpenAI(base_url=f"{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": question}],
    max_tokens=12,
    temperature=0,
    logprobs=True,
    top_logprobs=3,
)
for token in answer.choices[0].logprobs.content:
    others = ", ".join(f"{other.token!r} {math.exp(other.logprob):.2%}" for other in token.top_logprobs[1:])
    print(f"{token.token!r:16} {math.exp(token.logprob):8.2%}   {others}")
