"""Asks the hub whether a model can be had: reachable, there, and open to our token. Downloads nothing."""

import json
import os
import re
from urllib.parse import quote

from huggingface_hub import get_session, get_token, is_offline_mode

from actors.stores.urls import is_url
from actors.tensors.weights.source import is_read, local_folder
from deployments.doctor.facts import Asked, Hub
from deployments.doctor.storage import refusal

_PATIENCE_S = 5.0


def read_hub(asked: Asked) -> Hub | None:
    """What the hub says of model.source; None for a folder or a URL."""
    if asked.source is None or is_url(asked.source) or refusal(asked) is not None:
        return None
    if local_folder(asked.source, asked.revision) is not None:
        return None
    endpoint, token = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"), get_token()
    if token is not None and not re.fullmatch("[!-~]+", token):  # its client's error would quote it
        return Hub(endpoint, None, "the token holds characters that no token has", True, None)
    if is_offline_mode():
        return Hub(endpoint, None, "HF_HUB_OFFLINE is set", bool(token), None)
    revision = quote(asked.revision or "main", safe="")
    try:
        status, _ = _ask(endpoint, "HEAD", f"/{asked.source}/resolve/{revision}/config.json", token)
        model_bytes = None
        if status < 400:
            listed, body = _ask(endpoint, "GET", f"/api/models/{asked.source}/revision/{revision}?blobs=true", token)
            model_bytes = _weights(body) if listed == 200 else None
    except Exception as error:  # noqa: BLE001 - its client has errors of its own; all mean that it is not reached
        return Hub(endpoint, None, f"{type(error).__name__}: {error}", bool(token), None)
    return Hub(endpoint, status, "", bool(token), model_bytes)


def _ask(endpoint: str, method: str, path: str, token: str | None) -> tuple[int, bytes]:
    """By the session of the hub's own client, which goes by the proxies that the environment names."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    response = get_session().request(
        method, endpoint + path, headers=headers, timeout=_PATIENCE_S, follow_redirects=method == "GET"
    )
    return response.status_code, response.content


def _weights(body: bytes) -> int:
    files = json.loads(body).get("siblings", [])
    return sum(file.get("size") or 0 for file in files if is_read(file["rfilename"]))
