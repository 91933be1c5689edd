"""What the server sends: text messages, and what stands around bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ujson

from sqlrooms_server.errors import BadRequest, QueryId, ServerError


def encode(fields: dict[str, Any]) -> bytes:
    """A text message."""
    return ujson.dumps(fields, escape_forward_slashes=False).encode()


def encode_value(value: Any) -> bytes:
    """JSON of a value of somebody else. Raises ``BadRequest`` when it has none."""
    try:
        return ujson.dumps(value, escape_forward_slashes=False).encode()
    except (ValueError, OverflowError, TypeError) as error:
        raise BadRequest(f"That is not a JSON value: {error}.") from error


def encode_reply(kind: str, query_id: QueryId | None, **fields: Any) -> bytes:
    """A text message of type ``kind``, with the query id when the request had one."""
    head = {"type": kind} if query_id is None else {"type": kind, "queryId": query_id}
    return encode({**head, **fields})


def with_query_id(message: bytes, before: QueryId, after: QueryId) -> bytes:
    """``message``, a text message for the request ``before``, for the request ``after``."""
    if before == after:
        return message
    old, new = (encode({"queryId": query_id})[1:-1] for query_id in (before, after))
    return message.replace(old, new, 1)


def encode_said(channel: str, payload: Any) -> bytes:
    """A message of a channel. Raises ``BadRequest`` for a payload that JSON cannot carry."""
    try:
        return encode({"type": "notify", "channel": channel, "payload": payload})
    except (ValueError, OverflowError, TypeError) as error:
        raise BadRequest(f"payload is not a JSON value: {error}.") from error


def with_offset(said: bytes, offset: str) -> bytes:
    """``said``, a message of :func:`encode_said`, with its offset."""
    return said[:-1] + b"," + encode({"offset": offset})[1:]


def encode_error(error: ServerError) -> bytes:
    """The error frame of ``error``; the query id is left out when it is not known."""
    fields: dict[str, Any] = {"type": "error"}
    if error.query_id is not None:
        fields["queryId"] = error.query_id
    if error.channel is not None:
        fields["channel"] = error.channel
    if error.room is not None:
        fields["roomId"] = error.room
    fields["error"] = str(error)
    fields["code"] = error.code
    return encode(fields)


def binary_head(**fields: Any) -> bytes:
    """What stands before the body of a binary message."""
    header = encode(fields)
    return len(header).to_bytes(4, "big") + header


def encode_ok(query_id: QueryId) -> bytes:
    """The reply to a statement that has nothing to tell."""
    return encode({"type": "ok", "queryId": query_id})


def arrow_prefix(query_id: QueryId, **more: Any) -> bytes:
    """What stands before an Arrow body: header length and header, with the fields ``more``.

    The header is padded with spaces to a multiple of 8 bytes with its length, so that a client
    can read the columns in place.
    """
    return padded(encode({"type": "arrow", "queryId": query_id, **more}))


def framed(fields: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """A binary message, with its header padded like that of an Arrow reply."""
    return b"".join((padded(encode_value(fields)), body))


def padded(header: bytes) -> bytes:
    header += b" " * (-(4 + len(header)) % 8)
    return len(header).to_bytes(4, "big") + header


def json_prefix(query_id: QueryId) -> bytes:
    """What stands before the escaped rows of a JSON result."""
    return encode({"type": "json", "queryId": query_id})[:-1] + b',"data":"'


def json_suffix(**more: Any) -> bytes:
    """What stands after the rows, with the fields ``more``."""
    return b'"' + (b"," + encode(more)[1:] if more else b"}")
