"""HTTP requests for tests that look at status, headers and body."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.wire import DEADLINE


@dataclass(frozen=True)
class Answer:
    """Names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    /,
    **headers: str,
) -> Answer:
    """One request on a connection of its own; ``_`` in names of headers stands for ``-``.

    A body that is no bytes is sent in chunks.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        is_chunked = body is not None and not isinstance(body, bytes)
        connection.request(method, path, body, given, encode_chunked=is_chunked)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        connection.close()
