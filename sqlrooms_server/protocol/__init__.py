"""Bytes to frozen dataclasses and back. Knows neither sockets nor DuckDB.

The contract is ``docs/protocol.md``.
"""

from __future__ import annotations

from sqlrooms_server.protocol.channels import as_target, channel_name
from sqlrooms_server.protocol.decode import Limits, decode
from sqlrooms_server.protocol.fields import decode_json
from sqlrooms_server.protocol.frames import (
    arrow_prefix,
    binary_head,
    encode,
    encode_error,
    encode_ok,
    encode_reply,
    encode_said,
    encode_value,
    framed,
    json_prefix,
    json_suffix,
    with_offset,
    with_query_id,
)
from sqlrooms_server.protocol.names import parse_table_name, table_text

PROTOCOL_VERSION = 1

__all__ = [
    "PROTOCOL_VERSION",
    "Limits",
    "arrow_prefix",
    "as_target",
    "binary_head",
    "channel_name",
    "decode",
    "decode_json",
    "encode",
    "encode_error",
    "encode_ok",
    "encode_reply",
    "encode_said",
    "encode_value",
    "framed",
    "json_prefix",
    "json_suffix",
    "parse_table_name",
    "table_text",
    "with_offset",
    "with_query_id",
]
