"""Messages of streams of batches."""

from __future__ import annotations

from typing import Any

from sqlrooms_server.errors import BadRequest, QueryId
from sqlrooms_server.messages import StreamAck, StreamData
from sqlrooms_server.protocol.fields import bad_request, flag, query_id_in, whole_number
from sqlrooms_server.protocol.frames import encode, encode_reply, padded

# A short body must not keep the message around it alive.
_COPIED_BYTES = 64 << 10


def decode_stream_data(fields: dict[str, Any], body: memoryview) -> StreamData:
    """The message in ``fields`` and ``body``. Raises ``BadRequest``."""
    if "queryId" not in fields:
        raise BadRequest("streamData needs a field queryId.")
    name = fields.get("input")
    if not isinstance(name, str):
        raise bad_request(fields, "streamData needs a field input, a string.")
    query_id = query_id_in(fields)
    try:
        seq, last = whole_number(fields, "seq", 0, 1 << 53), flag(fields, "last")
    except BadRequest as error:
        raise BadRequest(str(error), query_id) from error
    if seq is None:
        raise BadRequest("streamData needs a field seq, a whole number from 0.", query_id)
    if len(body) < _COPIED_BYTES:
        body = memoryview(bytes(body))
    return StreamData(query_id, name, body, seq, last)


def decode_stream_ack(fields: dict[str, Any]) -> StreamAck:
    """The message in ``fields``. Raises ``BadRequest``."""
    # Its errors carry no query id: they would be taken for the end of the stream.
    if "queryId" not in fields:
        raise BadRequest("streamAck needs a field queryId.")
    name = fields.get("output")
    if not isinstance(name, str):
        raise BadRequest("streamAck needs a field output, a string.")
    size = whole_number(fields, "bytes", 0, 1 << 62)
    if size is None:
        raise BadRequest("streamAck needs a field bytes, the total consumed so far.")
    return StreamAck(query_id_in(fields), name, size)


def encode_stream_begin(
    query_id: QueryId, inputs: tuple[str, ...], outputs: tuple[str, ...], window: int
) -> bytes:
    """The stream has begun; ``window`` bytes of each input may be under way."""
    names = {"inputs": inputs, "outputs": outputs}
    return encode_reply("streamBegin", query_id, **names, window=window)


def encode_stream_ack(query_id: QueryId, name: str, size: int) -> bytes:
    """``size`` bytes of the input ``name`` were consumed so far."""
    return encode_reply("streamAck", query_id, input=name, bytes=size)


def encode_stream_end(query_id: QueryId) -> bytes:
    return encode_reply("streamEnd", query_id)


def stream_data_head(query_id: QueryId, output: str, seq: int, last: bool, **more: Any) -> bytes:
    """What stands before a part of an output, with the fields ``more``."""
    fields = {"type": "streamData", "queryId": query_id, "output": output}
    return padded(encode({**fields, "seq": seq, "last": last, **more}))
