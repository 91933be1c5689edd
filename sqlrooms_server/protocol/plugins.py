"""Messages of the types that plugins have."""

from __future__ import annotations

from typing import Any

from sqlrooms_server.errors import BadRequest
from sqlrooms_server.messages import NO_OPTIONS, Compression, Options, PluginMessage
from sqlrooms_server.protocol.fields import (
    MAX_TIMEOUT_MS,
    choice,
    flag,
    query_id_in,
    whole_number,
)

_OPTIONS = frozenset(("timeoutMs", "compression", "stream", "window", "resumable"))
_OF_PROTOCOL = _OPTIONS | {"type", "queryId"}


def decode_plugin_message(
    fields: dict[str, Any], size: int, body: memoryview | None = None
) -> PluginMessage:
    """The message in ``fields``, which came in ``size`` bytes. Raises ``BadRequest``."""
    query_id = query_id_in(fields)
    try:
        options = NO_OPTIONS if fields.keys().isdisjoint(_OPTIONS) else _options(fields)
    except BadRequest as error:
        raise BadRequest(str(error), query_id) from error
    own = {name: value for name, value in fields.items() if name not in _OF_PROTOCOL}
    return PluginMessage(fields["type"], query_id, own, options, body, size)


def _options(fields: dict[str, Any]) -> Options:
    timeout = whole_number(fields, "timeoutMs", 1, MAX_TIMEOUT_MS)
    compression: Compression | None = choice(fields, "compression", ("lz4", "zstd"), None)
    stream = flag(fields, "stream")
    window = whole_number(fields, "window", 1, 1 << 53)
    resumable = flag(fields, "resumable")
    return Options(
        timeout=None if timeout is None else timeout / 1000,
        compression=compression,
        stream=stream,
        window=window,
        resumable=resumable,
    )
