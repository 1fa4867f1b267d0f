"""Asks the hub whether a model can be had: reachable, there, and open to our token. Downloads nothing."""

import http.client
import json
import os
from pathlib import Path
from urllib.parse import quote, urlsplit

from actors.stores.urls import is_url
from actors.tensors.weights.source import local_folder
from deployments.doctor.facts import Asked, Hub

_PATIENCE_S = 5.0


def read_hub(asked: Asked) -> Hub | None:
    """What the hub says of model.source; None for a folder or a URL."""
    if asked.source is None or is_url(asked.source) or local_folder(asked.source, asked.revision) is not None:
        return None
    endpoint, token = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"), _token()
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):  # as its own client reads it
        return Hub(endpoint, None, "HF_HUB_OFFLINE is set", bool(token), None)
    revision = quote(asked.revision or "main", safe="")
    try:
        status, _ = _ask(endpoint, "HEAD", f"/{asked.source}/resolve/{revision}/config.json", token)
        model_bytes = None
        if status < 400:
            listed, body = _ask(endpoint, "GET", f"/api/models/{asked.source}/revision/{revision}?blobs=true", token)
            model_bytes = _weights(body) if listed == 200 else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Hub(endpoint, None, f"{type(error).__name__}: {error}", bool(token), None)
    return Hub(endpoint, status, "", bool(token), model_bytes)


def _ask(endpoint: str, method: str, path: str, token: str | None) -> tuple[int, bytes]:
    parts = urlsplit(endpoint)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=_PATIENCE_S)
    try:
        connection.request(method, parts.path + path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _token() -> str | None:
    """The token that the hub's own client would send."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    stored = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    return stored.read_text(encoding="utf-8").strip() or None if stored.is_file() else None


def _weights(body: bytes) -> int:
    files = json.loads(body).get("siblings", [])
    return sum(file.get("size") or 0 for file in files if _is_read(file["rfilename"]))


def _is_read(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
