"""The group of keys about the HTTP API: who may use it, from which web pages, and what is done with unknown fields."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from configs.group import Group

_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\-\[\]:]+")


def _origin(asked: str) -> str:
    if _ORIGIN.fullmatch(asked):  # in the form in which browsers send it
        scheme, _, rest = asked.lower().partition("://")
        return asked.lower().removesuffix({"http": ":80", "https": ":443"}.get(scheme, "")) if rest else asked
    raise ValueError("should be `*`, or a scheme and a host without a path, such as https://chat.example.org")


def _place(asked: str) -> str:
    kind, _, name = asked.partition(":")
    if kind == "file" and name and not name.startswith("/"):
        raise ValueError(f"should be file:/PATH, from the root on: replicas have folders of their own, without {name}")
    if kind in ("file", "env") and name:
        return asked
    raise ValueError("should be file:PATH or env:NAME; keys themselves do not belong into a config")


class ApiConfig(Group):
    """Who may use the HTTP API, and from where."""

    keys: Annotated[str, AfterValidator(_place)] | None = Field(
        default=None,
        description="Where the API keys are: `file:PATH`, read again when it changes, or `env:NAME`, a variable of the "
        "replica's node that holds the same text; none: whoever reaches the port may use everything. "
        "Set it wherever others can reach the port; see docs/security.md.",
    )
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = Field(
        default=(),
        strict=False,  # YAML has lists, no tuples
        description="Web pages that may call the API from a browser, as `https://HOST`; `*`: all. "
        "Set it for pages that are not served from the same host and port.",
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        default="ignore",
        description="What is done with fields of a request that nothing is known of: `ignore`, with a `Warning` header "
        "that names them; `refuse`: 400. Set `refuse` to find out what clients send.",
    )
