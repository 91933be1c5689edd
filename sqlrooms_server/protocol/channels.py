"""``subscribe``, ``unsubscribe``, ``notify`` and ``presence``."""

from __future__ import annotations

from typing import Any

from sqlrooms_server.errors import BadRequest, QueryId
from sqlrooms_server.messages import Notify, Presence, Subscribe, Target, Unsubscribe
from sqlrooms_server.protocol.fields import flag, given_query_id

MAX_CHANNEL_NAME_LENGTH = 255
MAX_USER_LENGTH = 255


def decode_subscribe(fields: dict[str, Any]) -> Subscribe:
    query_id = given_query_id(fields)
    since = fields.get("since")
    if since is not None and not isinstance(since, str):
        raise BadRequest("since must be the offset of an earlier message, a string.", query_id)
    try:
        recover, presence = flag(fields, "recover"), flag(fields, "presence")
    except BadRequest as error:
        raise BadRequest(str(error), query_id) from error
    recover = recover or since is not None
    return Subscribe(_channel(fields, query_id), query_id, recover, since, presence)


def decode_unsubscribe(fields: dict[str, Any]) -> Unsubscribe:
    query_id = given_query_id(fields)
    return Unsubscribe(_channel(fields, query_id), query_id)


def decode_presence(fields: dict[str, Any]) -> Presence:
    query_id = given_query_id(fields)
    return Presence(_channel(fields, query_id), query_id)


def decode_notify(fields: dict[str, Any]) -> Notify:
    query_id = given_query_id(fields)
    channel = _channel(fields, query_id)
    if "payload" not in fields:
        raise BadRequest("notify needs a field payload, any JSON value.", query_id)
    to = fields.get("to")
    target = None if to is None else as_target(to, query_id)
    return Notify(channel, fields["payload"], query_id, target)


def user_name(value: object, query_id: QueryId | None = None) -> str:
    """``value`` as the name of a user. Raises ``BadRequest``."""
    return _text(value, "user", MAX_USER_LENGTH, query_id)


def channel_name(value: object, query_id: QueryId | None = None) -> str:
    """``value`` as the name of a channel. Raises ``BadRequest``."""
    return _text(value, "channel", MAX_CHANNEL_NAME_LENGTH, query_id)


def _channel(fields: dict[str, Any], query_id: QueryId | None) -> str:
    return channel_name(fields.get("channel"), query_id)


def as_target(to: object, query_id: QueryId | None = None) -> Target:
    """``to`` as whom a message reaches. Raises ``BadRequest``."""
    if isinstance(to, dict) and len(to) == 1:
        if "user" in to:
            return Target(user=user_name(to["user"], query_id))
        if isinstance(to.get("connection"), str):
            return Target(connection=to["connection"])
    raise BadRequest("to must be an object with either user or connection, a string.", query_id)


def _text(value: object, field: str, max_length: int, query_id: QueryId | None) -> str:
    if isinstance(value, str):
        try:
            if 0 < len(value.encode()) <= max_length:
                return value
        except UnicodeEncodeError:
            pass
    raise BadRequest(f"{field} must be a string of 1 to {max_length} bytes.", query_id)
