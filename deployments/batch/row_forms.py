"""The forms of a row: OpenAI's batch format, or a plain prompt or messages; each becomes a Row, or an error row."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from deployments.api.bodies import ChatBody, CompletionBody, GenerationBody
from deployments.api.errors import ApiError
from deployments.api.responses import Stamp
from deployments.api.strict_body import Body, check_body, read_json
from deployments.batch.identity import Identity
from deployments.batch.lines import Line
from deployments.batch.rows import Row

MAX_ID_CHARS = 512
_KINDS: dict[str, type[GenerationBody]] = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
_OF_ERROR_ROWS = ("id", "response", "error")  # what an error row has beside the row that it came from


class _WithId(msgspec.Struct):
    custom_id: str = ""


_read_id = msgspec.json.Decoder(_WithId).decode


class _OpenAIRow(Body):
    """A row of OpenAI's batch format."""

    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: object


class _PlainId(Body):
    """The id of a row that is a request alone."""

    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)] | None = None


def custom_id_of(line: Line) -> str:
    """The row's own `custom_id`; where it has none that can be read, one from its number: row-1."""
    try:
        own = "" if line.raw is None else _read_id(line.raw).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        own = ""
    return own if 0 < len(own) <= MAX_ID_CHARS else f"row-{line.number + 1}"


def read_row(line: Line, custom_id: str, model: str, identity: Identity, max_row_bytes: int) -> Row:
    """A row that may be answered; rows that are a request alone ask for `model` where they name none.

    Raises ApiError, as the routes of HTTP would.
    """
    if line.raw is None or len(line.raw) > max_row_bytes:  # Parquet's readers hold rows of any size
        message = f"the row is larger than {max_row_bytes} bytes; send less, or raise admission.max_body_bytes"
        raise ApiError(413, message)
    body = _body(line.raw, model)
    if body.stream:
        raise ApiError(400, "stream: a batch streams nothing; leave it out", param="stream")
    if body.timeout is not None:
        raise ApiError(400, "timeout: rows of a batch have no deadline; leave it out", param="timeout")
    if body.request_id is not None:
        raise ApiError(400, "request_id: custom_id names a row; leave it out", param="request_id")
    if body.seed is None:
        body = body.model_copy(update={"seed": identity.seed(line.number, custom_id)})
    stamp = Stamp(identity.name("reply", line.number, custom_id), identity.created)
    return Row(line.number, custom_id, body, stamp, len(line.raw))


def original(line: Line) -> dict[str, Any]:
    """What an error row repeats of the row, so that it may be sent again: its fields, or its text under `row`."""
    if line.raw is None:
        return {}
    try:
        line.raw.decode()  # msgspec does not look into what it keeps raw
        fields = msgspec.json.decode(line.raw, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {"row": line.raw.decode("utf-8", "replace")}
    return {name: value for name, value in fields.items() if name not in _OF_ERROR_ROWS}


def _body(raw: bytes, model: str) -> GenerationBody:
    data = _row_again(read_json(raw))
    if "body" in data or "url" in data or "method" in data:
        row = check_body(data, _OpenAIRow)
        inner = read_json(row.body.encode()) if isinstance(row.body, str) else row.body  # a column of Parquet
        return check_body(inner, _KINDS[row.url])
    check_body({name: value for name, value in data.items() if name == "custom_id"}, _PlainId)
    if ("prompt" in data) == ("messages" in data):
        what = "has both prompt and messages" if "prompt" in data else "has no body, no prompt and no messages"
        message = f"the row {what}; write one of them, or OpenAI's custom_id, method, url and body"
        raise ApiError(400, message, param="prompt")
    fields = {name: value for name, value in data.items() if name != "custom_id"}
    if fields.get("model") is None:
        fields["model"] = model
    return check_body(fields, CompletionBody if "prompt" in data else ChatBody)


def _row_again(data: Any) -> dict[str, Any]:
    """The fields of a row; of an error row, those of the row that it came from."""
    if not isinstance(data, dict):
        raise ApiError(400, 'the row must be a JSON object, as in {"prompt": "…"}')
    if not ("response" in data and "error" in data):
        return data
    if isinstance(data.get("row"), str):
        return _row_again(read_json(data["row"].encode()))
    return {name: value for name, value in data.items() if name not in _OF_ERROR_ROWS}
