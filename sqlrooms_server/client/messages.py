"""Messages of the server as replies, and those of the client as text or bytes. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ujson

from sqlrooms_server.client.plugin_replies import (
    Answered,
    Event,
    InputAck,
    ObjectAck,
    ObjectBytes,
    ObjectChanges,
    ObjectClosed,
    ObjectData,
    ObjectInfo,
    ObjectList,
    Opened,
    OutputData,
    Referred,
    StreamBegun,
    StreamEnded,
)
from sqlrooms_server.client.replies import (
    CacheStats,
    CancelAck,
    Change,
    Chunk,
    Consumed,
    Done,
    Failed,
    Joined,
    Left,
    Member,
    MemberList,
    Message,
    NotifyAck,
    Progress,
    Reply,
    Resumable,
    Rows,
    SessionClosed,
    Subscribed,
    Summary,
    Watching,
    Welcome,
)

Id = int | str
# What a reply belongs to: a kind of request, and its id or name.
Key = tuple[str, Id]

HELLO: Key = ("hello", "")
# Kinds of requests whose replies may have no id, and what belongs to the latest watch.
CACHE_STATS, WATCH = "cacheStats", "watch"
CHANGES: Key = ("changes", "")
# Kinds of requests about channels, and what belongs to those who hear one.
SUBSCRIBE, NOTIFY, MEMBERS, CHANNEL = "subscribe", "notify", "presence", "channel"
# What belongs to who watches which objects are published.
OBJECTS: Key = ("objects", "")
NO_ID = ""

# How results of the server begin.
_JSON_RESULT = '{"type":"json",'


def decode(message: str | bytes) -> tuple[Key | None, Reply] | None:
    """What the server sent, and what it belongs to.

    None for types this client does not know, and for a JSON result that failed half-way: it is cut,
    and the error follows as a message of its own. The key is None for an error about no certain
    request. Raises ``ValueError``, ``LookupError`` or ``TypeError`` for what is no message of the
    protocol.
    """
    body = memoryview(b"")
    if isinstance(message, bytes):
        end = 4 + int.from_bytes(message[:4], "big")
        fields = ujson.loads(message[4:end])
        body = memoryview(message)[end:]
    else:
        try:
            fields = ujson.loads(message)
        except ValueError:
            if message.startswith(_JSON_RESULT):
                return None
            raise
    decoder = _DECODERS.get(fields["type"])
    return None if decoder is None else decoder(fields, body)


def encode(**fields: Any) -> str:
    """A text message. Fields that are None are left out."""
    return ujson.dumps(
        {name: value for name, value in fields.items() if value is not None},
        escape_forward_slashes=False,
    )


def encode_payload(**fields: Any) -> str:
    """A message with a ``payload``, any JSON value. Raises ``TypeError`` for what is none."""
    try:
        return ujson.dumps(fields, escape_forward_slashes=False, allow_nan=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"The payload is no JSON value: {error}.") from error


def framed(header: str, body: bytes) -> bytes:
    """A binary message, padded so that the server need not copy the body to align it."""
    encoded = header.encode()
    encoded += b" " * (-(4 + len(encoded)) % 8)
    return b"".join((len(encoded).to_bytes(4, "big"), encoded, body))


def _query(fields: dict[str, Any]) -> Key:
    return ("query", fields["queryId"])


def _arrow(fields: dict[str, Any], body: memoryview) -> tuple[Key, Reply]:
    # Without seq it is a whole result, from a server that sends no chunks.
    is_last = fields.get("last", True)
    summary = _summary(fields) if is_last and "rows" in fields else None
    return _query(fields), Chunk(
        seq=fields.get("seq", 0),
        body=body,
        is_last=is_last,
        summary=summary,
        truncated=fields.get("truncated", False),
        cached=fields.get("cached", False),
    )


def _summary(fields: dict[str, Any]) -> Summary:
    ms = fields["ms"]
    return Summary(
        rows=fields["rows"],
        bytes=fields["bytes"],
        queued_ms=ms["queued"],
        running_ms=ms["running"],
        sending_ms=ms["sending"],
        truncated=fields.get("truncated", False),
        truncated_by=fields.get("truncatedBy"),
    )


def _progress(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return _query(fields), Progress(
        state=fields["state"],
        percent=fields["percent"],
        position=fields["position"],
        queued_ms=fields["queuedMs"],
        running_ms=fields["runningMs"],
    )


def _cache_stats(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return (CACHE_STATS, fields.get("queryId", NO_ID)), CacheStats(
        enabled=fields.get("enabled", True),
        hits=fields["hits"],
        misses=fields["misses"],
        joined=fields["joined"],
        uncacheable=fields["uncacheable"],
        entries=fields["entries"],
        memory_bytes=fields["memoryBytes"],
        disk_bytes=fields["diskBytes"],
    )


def _watching(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    reply = Watching(fields["versions"], fields["version"], fields.get("resync", False))
    return (WATCH, fields.get("queryId", NO_ID)), reply


def _changed(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return CHANGES, Change(
        tables=fields["tables"],
        op=fields["op"],
        version=fields["version"],
        resync=fields.get("resync", False),
    )


def _notify(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return (CHANNEL, fields["channel"]), Message(fields["payload"], fields.get("offset"))


def _presence(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    if "members" in fields:
        members = MemberList(map(_member, fields["members"]))
        members.total = fields.get("count", len(members))
        return (MEMBERS, fields.get("queryId", NO_ID)), members
    channel = (CHANNEL, fields["channel"])
    if "joined" in fields:
        return channel, Joined(_member(fields["joined"]))
    return channel, Left(_member(fields["left"]))


def _member(fields: dict[str, Any]) -> Member:
    return Member(fields["connectionId"], fields.get("user"))


def _error(fields: dict[str, Any], _: memoryview) -> tuple[Key | None, Reply]:
    key = _query(fields) if "queryId" in fields else None
    return key, Failed(fields["error"], fields["code"])


def _object_bytes(kind: type[ObjectBytes]) -> Callable[..., tuple[Key, Reply]]:
    def decode(fields: dict[str, Any], body: memoryview) -> tuple[Key, Reply]:
        references = tuple(
            Referred(one["ticket"], one["objectType"], one["canFetch"], one["canOpen"])
            for one in fields["references"]
        )
        # Windows count whole messages.
        return _query(fields), kind(bytes(body), references, memoryview(body.obj).nbytes)

    return decode


def _object_list(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return _query(fields), ObjectList(map(_object, fields["objects"]))


def _object_changes(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    published = map(_object, (*fields["added"], *fields["replaced"]))
    return OBJECTS, ObjectChanges(tuple(published), frozenset(fields["removed"]))


def _object(fields: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(fields["name"], fields["objectType"], fields["canFetch"], fields["canOpen"])


def _stream_begun(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    names = (tuple(fields["inputs"]), tuple(fields["outputs"]))
    return _query(fields), StreamBegun(*names, fields["window"])


def _stream_data(fields: dict[str, Any], body: memoryview) -> tuple[Key, Reply]:
    return _query(fields), OutputData(fields["output"], fields["seq"], body, fields["last"])


def _answered(fields: dict[str, Any], body: memoryview) -> tuple[Key, Reply]:
    return _query(fields), Answered(fields["data"] if "data" in fields else bytes(body))


_DECODERS: dict[str, Callable[[dict[str, Any], memoryview], tuple[Key | None, Reply]]] = {
    "arrow": _arrow,
    "json": lambda fields, _: (_query(fields), Rows(fields["data"], fields.get("cached", False))),
    "ok": lambda fields, _: (_query(fields), Done(0)),
    "uploadAck": lambda fields, _: (_query(fields), Done(fields.get("rows", 0))),
    "uploadProgress": lambda fields, _: (_query(fields), Consumed(fields["bytes"])),
    "progress": _progress,
    "resumable": lambda fields, _: (_query(fields), Resumable(fields["token"])),
    "cacheStats": _cache_stats,
    "watching": _watching,
    "changed": _changed,
    "subscribed": lambda fields, _: (
        (SUBSCRIBE, fields["queryId"]),
        Subscribed(fields["offset"], fields["recovered"]),
    ),
    "notify": _notify,
    "notifyAck": lambda fields, _: (
        (NOTIFY, fields["queryId"]),
        NotifyAck(fields.get("delivered")),
    ),
    "presence": _presence,
    "cancelAck": lambda fields, _: (
        ("cancel", fields["queryId"]),
        CancelAck(fields["cancelled"]),
    ),
    "sessionClosed": lambda fields, _: (
        ("session", fields["session"]),
        SessionClosed(fields["closed"]),
    ),
    "welcome": lambda fields, _: (
        HELLO,
        Welcome(fields["limits"]["uploadWindow"], fields.get("connectionId")),
    ),
    "reply": _answered,
    "event": lambda fields, _: (_query(fields), Event(fields["data"])),
    "object": _object_bytes(ObjectBytes),
    "object-data": _object_bytes(ObjectData),
    "object-list": _object_list,
    "object-changes": _object_changes,
    "object-opened": lambda fields, _: (_query(fields), Opened(fields["window"])),
    "object-ack": lambda fields, _: (_query(fields), ObjectAck(fields["bytes"])),
    "object-closed": lambda fields, _: (_query(fields), ObjectClosed()),
    "streamBegin": _stream_begun,
    "streamData": _stream_data,
    "streamAck": lambda fields, _: (_query(fields), InputAck(fields["input"], fields["bytes"])),
    "streamEnd": lambda fields, _: (_query(fields), StreamEnded()),
    "error": _error,
}
