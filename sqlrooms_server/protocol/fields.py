"""The fields of a message, checked one by one. Each error names the field."""

from __future__ import annotations

import uuid
from typing import Any

import ujson

from sqlrooms_server.errors import BadRequest, QueryId, TooLarge

MAX_QUERY_ID_LENGTH = 256
MAX_SESSION_NAME_LENGTH = 64

# Longer than any deadline somebody means, and safe to add to a clock.
MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000


def decode_json(data: bytes, what: str) -> Any:
    """The JSON value in ``data``, which errors call ``what``. Raises ``BadRequest``."""
    try:
        return ujson.loads(data)
    except ValueError as error:
        raise BadRequest(f"{what} is not JSON: {error}.") from error


def json_object(data: bytes, what: str) -> dict[str, Any]:
    fields = decode_json(data, what)
    if not isinstance(fields, dict):
        raise BadRequest(f"{what} must be a JSON object.")
    return fields


def query_id_in(fields: dict[str, Any]) -> QueryId:
    if "queryId" not in fields:
        return str(uuid.uuid4())
    value = fields["queryId"]
    if isinstance(value, str):
        if 0 < len(value) and len(value.encode("utf-8", "surrogatepass")) <= MAX_QUERY_ID_LENGTH:
            return value
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise BadRequest(
        f"queryId must be a non-empty string of at most {MAX_QUERY_ID_LENGTH} bytes or an integer."
    )


def given_query_id(fields: dict[str, Any]) -> QueryId | None:
    """The query id of a message that needs none."""
    return query_id_in(fields) if "queryId" in fields else None


def bad_request(fields: dict[str, Any], text: str) -> BadRequest:
    """The error for ``fields``, with their query id if that at least is valid."""
    try:
        query_id = query_id_in(fields) if "queryId" in fields else None
    except BadRequest:
        query_id = None
    return BadRequest(text, query_id)


def flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise BadRequest(f"{name} must be true or false.")


def whole_number(fields: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise BadRequest(f"{name} must be a whole number from {low} to {high}.")


def choice(fields: dict[str, Any], name: str, choices: tuple[str, ...], default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if value not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise BadRequest(f"{name} must be one of {known}.")
    return value


def session_name(fields: dict[str, Any]) -> str:
    name = fields.get("session")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_SESSION_NAME_LENGTH:
        raise BadRequest(f"session must be a string of 1 to {MAX_SESSION_NAME_LENGTH} characters.")
    return name


def check_sql(sql: str, query_id: QueryId, max_length: int) -> None:
    try:
        length = len(sql) if sql.isascii() else len(sql.encode())
    except UnicodeEncodeError as error:
        raise BadRequest("sql holds half of a surrogate pair.", query_id) from error
    if length > max_length:
        raise TooLarge(
            f"sql has {length} bytes; at most {max_length} are allowed "
            "(--max-sql-length). Send data with uploadArrow.",
            query_id,
        )
    if "\0" in sql:
        raise BadRequest("sql holds a NUL character.", query_id)


def shown(text: str) -> str:
    """``text`` quoted and cut, for an error message."""
    return ujson.dumps(text if len(text) <= 40 else text[:40] + "…", ensure_ascii=False)
