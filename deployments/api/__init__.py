"""The OpenAI HTTP API: routes, request bodies, responses, and what stands between them and the engine."""
